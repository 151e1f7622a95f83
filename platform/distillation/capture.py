"""Takes tensors out of a forward pass by hooks; the model's code stays as it is (papers.md S2.4).

Shape suffixes: B rows, T tokens, H width, A heads, D width of a head, U distinct texts of a batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from driftline.platform.distillation.anatomy import (
    Anatomy,
    anatomy_of,
    find_module,
    first_tensor,
    inner_model,
)
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.models.encoder import text_encoders
from driftline.platform.models.student import AD, PAGE, TwinStudent

Read = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Any]
"""What to keep of one call: positional arguments, named arguments, output."""

PLAIN_ATTENTION: Final = (
    "BertSelfAttention",
    "RobertaSelfAttention",
    "XLMRobertaSelfAttention",
    "CamembertSelfAttention",
    "ElectraSelfAttention",
    "DistilBertSelfAttention",
)
"""Attention whose scores are query x key x scaling and nothing else."""
ARMS: Final = "arms"
ROLES: Final = {"arms.page": PAGE, "arms.ad": AD}


class Capture:
    """Collects named tensors while a model runs.

    ``with Capture(model, keys) as seen: model(...)``; then ``seen.features``. Hooks are gone when
    the block ends, however it ends. What the keys mean:

    - ``hidden.0`` is the embedding output, ``hidden.L`` the output of layer L, as
      ``output_hidden_states`` of transformers gives them; ``cls.L`` is position 0 of it.
    - ``scores.L`` are the raw products of query and key, scaled, *without* the padding's mask;
      ``attention.L`` their softmax with the mask, *before* dropout. Both are computed here from
      the layer's own projections, so that they exist under sdpa and flash attention too, which
      give none (papers.md B15). Models with another attention (relative positions) must run
      ``attn_implementation="eager"``: then ``attention.L`` is what their layer returns.
    - ``module.PATH`` is the (first) output of that module.
    - A twin student reads two texts a row and each distinct text once. ``module.arms.page`` and
      ``module.arms.ad`` are its vectors gathered to rows, ``module.arms`` and ``cls.L`` both side
      by side ``[B, 2H]`` (zeros for a product without text below the last layer); other modules
      must stand outside the arms.

    Gradients flow through what is captured. The last layer of our towers, normally computed at
    position 0 only, is computed whole where a key needs it.

    Args:
        model: Any module; hooks go to the one inside ``DistributedDataParallel``.
        keys: What to collect.

    Raises:
        ValueError: no such layer or module; the message names what there is.
    """

    def __init__(self, model: nn.Module, keys: Iterable[FeatureKey]) -> None:
        self.model = inner_model(model)
        self.keys = tuple(dict.fromkeys(keys))
        self._taps: list[_Tap] = []
        self._whole = False
        plan = self._plan_twin if isinstance(self.model, TwinStudent) else self._plan
        self._finish: dict[FeatureKey, Callable[[], Tensor]] = {key: plan(key) for key in self.keys}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as hooks:
            for tap in self._taps:
                hooks.enter_context(tap)
            for encoder in text_encoders(self.model) if self._whole else ():
                hooks.callback(setattr, encoder, "whole_last_layer", encoder.whole_last_layer)
                encoder.whole_last_layer = True
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    @property
    def features(self) -> dict[FeatureKey, Tensor]:
        """The tensors of the last forward pass.

        Raises:
            ValueError: a module did not run, ran several times, or gave no tensor.
        """
        return {key: _tensor(key, finish()) for key, finish in self._finish.items()}

    def clear(self) -> None:
        """Forget the tensors, so that their graph can be freed."""
        for tap in self._taps:
            tap.values.clear()

    def _tap(self, key: FeatureKey, module: nn.Module, read: Read) -> "_Tap":
        tap = _Tap(key, module, read)
        self._taps.append(tap)
        return tap

    # --- one encoder -------------------------------------------------------------------------

    def _plan(self, key: FeatureKey) -> Callable[[], Tensor]:
        if key.kind == "module":
            module = find_module(self.model, str(key.place))
            self._whole |= any(module in set(part.modules()) for part in text_encoders(self.model))
            return self._tap(key, module, _output).one
        anatomy = anatomy_of(self.model)
        layer = check_layer(key, anatomy, self.model)
        if key.kind in ("attention", "scores"):
            self._whole = True
            return self._plan_attention(key, anatomy.layers[layer - 1])
        states = self._states(key, anatomy, layer)
        if key.kind == "hidden":
            self._whole |= layer == anatomy.num_layers or anatomy.num_layers == 1
            return states.one
        self._whole |= layer == 0 and anatomy.num_layers == 1
        return lambda: _first(states.one())

    def _states(self, key: FeatureKey, anatomy: Anatomy, layer: int) -> "_Tap":
        """Hidden states: what the first layer is given, or what a layer gives."""
        if layer == 0:
            return self._tap(key, anatomy.layers[0], _input)
        module = anatomy.layers[layer - 1]
        if key.kind == "cls" and isinstance(module, BertLayer):
            module = module.output  # also runs where the last layer is computed at one position
        return self._tap(key, module, _output)

    def _plan_attention(self, key: FeatureKey, layer: nn.Module) -> Callable[[], Tensor]:
        own = _attention_of(layer)
        if own is None:
            return self._plan_given_attention(key, layer)
        query, key_ = (
            self._tap(key, part, _output)
            for part in (
                getattr(own, "query", None) or own.q_lin,
                getattr(own, "key", None) or own.k_lin,
            )
        )
        mask = self._tap(key, own, _mask)

        def scores() -> Tensor:
            first, second = (
                part.one().unflatten(-1, (-1, own.attention_head_size)).transpose(1, 2)
                for part in (query, key_)
            )
            return first @ second.transpose(2, 3) * own.scaling

        if key.kind == "scores":
            return scores
        return lambda: _softmax(scores(), mask.one())

    def _plan_given_attention(self, key: FeatureKey, layer: nn.Module) -> Callable[[], Tensor]:
        eager = getattr(getattr(self.model, "config", None), "_attn_implementation", "") == "eager"
        inside = [part for part in layer.modules() if type(part).__name__.endswith("Attention")]
        if key.kind == "scores" or not eager or not inside:
            raise ValueError(
                f"{key} of {type(self.model).__name__} cannot be computed from its layers "
                f"({type(layer).__name__}); load the model with attn_implementation='eager' and "
                "match attention, or match hidden states"
            )
        return self._tap(key, inside[-1], _second_output).one

    # --- twin student ------------------------------------------------------------------------

    def _plan_twin(self, key: FeatureKey) -> Callable[[], Tensor]:
        model = self.model
        assert isinstance(model, TwinStudent)
        path = str(key.place)
        inside = key.kind == "module" and path.split(".")[0] == ARMS
        if key.kind not in ("module", "cls") or (inside and path not in (ARMS, *ROLES)):
            raise _no_alignment(key)
        if key.kind == "module" and not inside:
            return self._tap(key, find_module(model, path), _output).one
        both = self._tap(key, model.head, lambda args, _, __: (args[PAGE], args[AD]))
        if path in ROLES:
            return lambda: _tensor(key, both.one()[ROLES[path]])
        anatomy = anatomy_of(model)
        layer = anatomy.num_layers if inside else check_layer(key, anatomy, model)
        if layer == anatomy.num_layers:
            return lambda: torch.cat(both.one(), dim=1)
        call = self._tap(key, model, lambda args, _, __: args[:3])
        states = [
            self._states(key, anatomy_of(backbone), layer) for backbone in model.arms.backbones
        ]
        self._whole |= anatomy.num_layers == 1

        def gathered() -> Tensor:
            groups, *index = call.one()
            calls = [part for tap in states for part in tap.values]
            cut = len(groups[PAGE])
            return torch.cat(
                [
                    _gather(calls[:cut] if role == PAGE else calls[cut:], index[role])
                    for role in (PAGE, AD)
                ],
                dim=1,
            )

        return gathered


class _Tap:
    """A hook on one module; holds what it read in each call."""

    def __init__(self, key: FeatureKey, module: nn.Module, read: Read) -> None:
        self.key = key
        self.module = module
        self.read = read
        self.values: list[Any] = []

    def __enter__(self) -> None:
        self.values.clear()
        self._handle = self.module.register_forward_hook(self._see, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.values.append(self.read(args, kwargs, out))

    def one(self) -> Any:
        """What the only call gave."""
        if len(self.values) != 1:
            raise ValueError(
                f"{self.key}: its module ({type(self.module).__name__}) ran {len(self.values)} "
                "times in the forward pass; name a module that runs exactly once"
            )
        return self.values[0]


def check_layer(key: FeatureKey, anatomy: Anatomy, model: nn.Module) -> int:
    """The layer that a key names.

    Raises:
        ValueError: the model has no such layer.
    """
    first = 1 if key.kind in ("attention", "scores") else 0
    if isinstance(key.place, int) and first <= key.place <= anatomy.num_layers:
        return key.place
    raise ValueError(
        f"{type(inner_model(model)).__name__} has no {key}; it has {anatomy.num_layers} layers: "
        f"{key.kind}.{first} to {key.kind}.{anatomy.num_layers}"
    )


def _attention_of(layer: nn.Module) -> Any:
    """The layer's self-attention, where query and key alone decide it; else None."""
    found = [part for part in layer.modules() if type(part).__name__ in PLAIN_ATTENTION]
    return found[0] if len(found) == 1 else None


def _no_alignment(key: FeatureKey) -> ValueError:
    return ValueError(
        f"a twin student reads two texts a row, each distinct text once, so {key} cannot be "
        "matched row by row; match cls.N (kind: pkd), or kind: module with arms, arms.page, "
        "arms.ad, or a module below head such as head.layers"
    )


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any], _: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _output(_: tuple[Any, ...], __: Mapping[str, Any], output: Any) -> Any:
    return first_tensor(output)


def _second_output(_: tuple[Any, ...], __: Mapping[str, Any], output: Any) -> Any:
    return output[1]


def _mask(args: tuple[Any, ...], kwargs: Mapping[str, Any], _: Any) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("attention_mask")


def _softmax(scores_BATT: Tensor, mask: Tensor | None) -> Tensor:
    """Probabilities; the mask is of the kind that the model's attention takes."""
    if mask is None:
        return scores_BATT.softmax(dim=-1)
    if mask.ndim == 2:
        mask = mask[:, None, None, :].bool()
    if mask.dtype == torch.bool:
        lowest = torch.finfo(scores_BATT.dtype).min
        return scores_BATT.masked_fill(~mask, lowest).softmax(dim=-1)
    return (scores_BATT + mask).softmax(dim=-1)


def _first(states_BTH: Tensor) -> Tensor:
    return states_BTH[:, 0]


def _tensor(key: FeatureKey, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{key}: its module gave {type(value).__name__}, not a tensor")
    return value


def _gather(states: Sequence[Tensor], index_B: Tensor) -> Tensor:
    """Position 0 of the distinct texts, in rows; zeros where a row has none (index 0)."""
    found = [part_UTH[:, 0] for part_UTH in states]
    rows_UH = torch.cat([found[0].new_zeros(1, found[0].shape[-1]), *found])
    return rows_UH[index_B]
