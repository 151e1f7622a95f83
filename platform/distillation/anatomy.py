"""Where a model keeps its transformer layers, and how wide they are.

Nothing is asked of the model but its modules: a list of layers of one class, called ``layer`` or
``layers`` (BERT, RoBERTa, ELECTRA, DistilBERT, ModernBERT, ``nn.TransformerEncoder``, ours).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from driftline.platform.distillation.match_points import ModelShape
from driftline.platform.models.encoder import text_encoders
from driftline.platform.models.student import TwinStudent

LIST_NAMES: Final = ("layer", "layers")
WIDTH_NAMES: Final = ("hidden_size", "dim", "d_model")
NUM_HEADS_NAMES: Final = ("num_attention_heads", "n_heads", "num_heads")
MAX_NAMES: Final = 40


@dataclass(frozen=True)
class Anatomy:
    """The layers of the one encoder in a model."""

    path: str
    """Path of the list of layers."""
    layers: tuple[nn.Module, ...]
    hidden_size: int | None
    """Width of the hidden states, as the model's config says; None where there is none."""
    num_heads: int | None

    @property
    def num_layers(self) -> int:
        """Layers after the embeddings."""
        return len(self.layers)


def inner_model(model: nn.Module) -> nn.Module:
    """The model itself, without ``DistributedDataParallel`` around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def anatomy_of(model: nn.Module) -> Anatomy:
    """Find the encoder's layers. Tied or not, a twin student shows those of its page arm.

    Raises:
        ValueError: the model holds no list of layers, or several.
    """
    model = inner_model(model)
    searched = model.arms.backbones[0] if isinstance(model, TwinStudent) else model
    found = [
        (path, part)
        for path, part in searched.named_modules()
        if path.rsplit(".", 1)[-1] in LIST_NAMES and _is_stack(part)
    ]
    if len(found) != 1:
        what = "no list" if not found else f"several lists ({[path for path, _ in found]})"
        raise ValueError(
            f"{type(model).__name__} holds {what} of layers called {' or '.join(LIST_NAMES)}; name "
            f"tensors by module.PATH instead, one of {names_of(model)}"
        )
    path, stack = found[0]
    config = _config(searched, path)
    return Anatomy(
        path=path,
        layers=tuple(stack.children()),
        hidden_size=_first_number(config, WIDTH_NAMES),
        num_heads=_first_number(config, NUM_HEADS_NAMES),
    )


def shape_of(
    model: nn.Module,
    *,
    tokens: str | None = None,
    run: Callable[[], object] | None = None,
) -> ModelShape:
    """What matches must know of a model; see ``ModelShape``.

    Args:
        model: Any module. One without a list of layers has 0, and only its modules can be matched.
        tokens: How rows become tokens, where two models may differ in it.
        run: Runs the model once, on any input, in evaluation mode and without gradient: the widths
            of all modules are then seen. Without, those of linear layers, norms and tables.
    """
    model = inner_model(model)
    widths = _static_widths(model) if run is None else _seen_widths(model, run)
    try:
        anatomy = anatomy_of(model)
    except ValueError:
        return ModelShape(num_layers=0, width=0, tokens=tokens, modules=widths)
    width = anatomy.hidden_size or 0
    heads = anatomy.num_heads or 0
    if isinstance(model, TwinStudent):  # a row's vectors of both texts; attention is not of rows
        widths = {name: size for name, size in widths.items() if name.split(".")[0] != "arms"}
        widths |= {"arms": 2 * width, "arms.page": width, "arms.ad": width}
        width, heads = 2 * width, 0
    return ModelShape(
        num_layers=anatomy.num_layers,
        width=width,
        num_heads=heads,
        tokens=tokens,
        modules=widths,
    )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; afterwards every module is as it was."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, was_training in modes:
            part.training = was_training


def find_module(model: nn.Module, path: str) -> nn.Module:
    """A part of a model.

    Raises:
        ValueError: there is no such part; the message names those that there are.
    """
    try:
        return inner_model(model).get_submodule(path)
    except AttributeError:
        names = [name for name, _ in inner_model(model).named_modules() if name]
        close = get_close_matches(path, names, n=3)
        hint = f"did you mean {close}? " if close else ""
        raise ValueError(
            f"{type(inner_model(model)).__name__} has no module {path!r}; {hint}"
            f"it has {names_of(model)}"
        ) from None


def names_of(model: nn.Module) -> str:
    """Paths of the modules, the shallow ones first, as many as a message can hold."""
    names = sorted(
        (name for name, _ in inner_model(model).named_modules() if name),
        key=lambda name: (name.count("."), name),
    )
    more = f" and {len(names) - MAX_NAMES} deeper ones" if len(names) > MAX_NAMES else ""
    return f"{', '.join(names[:MAX_NAMES])}{more}"


def _static_widths(model: nn.Module) -> dict[str, int]:
    found = {name: _width(part) for name, part in model.named_modules() if name}
    return {name: width for name, width in found.items() if width is not None}


def _width(part: nn.Module) -> int | None:
    """Last dimension of what a module gives, where its own sizes tell."""
    match part:
        case nn.Linear():
            return part.out_features
        case nn.Embedding() | nn.EmbeddingBag():
            return part.embedding_dim
        case nn.LayerNorm():
            return int(part.normalized_shape[-1])
        case nn.Sequential():
            widths = (_width(child) for child in reversed(list(part)))
            return next((width for width in widths if width is not None), None)
        case _:
            return None


def _seen_widths(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    found: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            first = first_tensor(output)
            if isinstance(first, Tensor) and first.ndim:
                found[name] = first.shape[-1]

        return see

    with ExitStack() as undo, evaluating(model):
        for name, part in model.named_modules():
            if name:
                undo.callback(part.register_forward_hook(watch(name)).remove)
        for encoder in text_encoders(model):
            undo.callback(setattr, encoder, "whole_last_layer", encoder.whole_last_layer)
            encoder.whole_last_layer = True
        run()
    return found


def first_tensor(output: Any) -> Any:
    """What a module gives, or the first of what it gives."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return output[0] if isinstance(output, tuple | list) and output else output


def _is_stack(part: nn.Module) -> bool:
    if not isinstance(part, nn.ModuleList) or not len(part):
        return False
    return len({type(layer) for layer in part}) == 1


def _config(model: nn.Module, path: str) -> Any:
    """Config of the innermost module around the layers that has one."""
    names = path.split(".")
    for depth in range(len(names) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(names[:depth])), "config", None)
        if config is not None:
            return config
    return None


def _first_number(config: Any, names: Iterable[str]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
