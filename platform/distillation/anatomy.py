"""Where a model keeps its transformer layers, and how wide they are.

Nothing is asked of the model but its modules: a list of layers of one class, called ``layer`` or
``layers`` (BERT, RoBERTa, ELECTRA, DistilBERT, ModernBERT, ``nn.TransformerEncoder``, ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
