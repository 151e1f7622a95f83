"""Things a settings file names by ``kind``: ours, and those that installed packages bring.

A kind is one frozen settings class with its behaviour as a method. There is no registry: a kind is
found because it is a subclass. A package of the user's own makes its module known by an entry point
in the group ``driftline.kinds``, so that workers on other machines find it too.
"""

import hashlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Self, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from driftline.platform.data_settings import Settings

GROUP: Final = "driftline.kinds"
OURS: Final = "driftline."


class Kind(Settings):
    """Root of all that is told apart by ``kind``.

    A *base* (``class SoftLoss(Kind)``) says what its kinds can do; a *kind* declares
    ``kind: Literal["name"] = "name"``. A settings field of the base's type takes any of its kinds.
    """

    kind: str

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if cls.__base__ is Settings or _is_kind(cls):
            return schema
        return core_schema.no_info_before_validator_function(
            cls.parse, schema, serialization=core_schema.simple_ser_schema("any")
        )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Refuse a second kind of the same name; reading a module again is not one."""
        for name in _names(cls):
            for other in _below(_base(cls)):
                if name in _names(other) and _full_name(other) != _full_name(cls):
                    raise ValueError(
                        f"kind {name!r} of {_base(cls).__name__} is taken by {_full_name(other)}; "
                        f"give {_full_name(cls)} another name"
                    )

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Read one of this base's kinds: an instance, ``{"kind": name, ...}`` or the bare name.

        Raises:
            ValueError: no such kind, also not in the installed packages; or its keys are wrong.
        """
        if isinstance(raw, cls):
            return raw
        values = {"kind": raw} if isinstance(raw, str) else raw
        if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
            raise ValueError(
                f"needs kind: one of {', '.join(sorted(cls.known()))}, or of an installed package"
            )
        name = values["kind"]
        found = cls.known().get(name) or cls.known(installed=True).get(name)
        if found is None:
            raise ValueError(
                f"kind must be one of {', '.join(sorted(cls.known()))}; to bring your own, install "
                f"a package with an entry point in the group {GROUP!r}"
            )
        return found.model_validate(dict(values))

    @classmethod
    def known(cls, *, installed: bool = False) -> dict[str, type[Self]]:
        """All kinds of this base by name; ``installed`` imports the modules of other packages.

        Raises:
            ValueError: such a module cannot be imported.
        """
        if installed:
            for entry in entry_points(group=GROUP):
                try:
                    entry.load()
                except (ImportError, AttributeError, ValueError) as error:
                    raise ValueError(
                        f"entry point {entry.name!r} = {entry.value!r} of {GROUP!r} cannot be "
                        f"imported: {error}"
                    ) from error
        found: dict[str, type[Self]] = {}
        for kind in _below(cls):
            for name in _names(kind):
                # The newest of a module read again, never one that was refused.
                if name not in found or _full_name(found[name]) == _full_name(kind):
                    found[name] = kind
        return found


def foreign_code(settings: Any) -> dict[str, str]:
    """Hash of the source file of each kind in these settings that is not ours, by its class.

    Settings say which loss of the user's own is meant, not what it computes: without this, results
    of a former version of it would be taken for those of the present one. Ours count by the
    ``FORMAT`` of whatever uses them.
    """
    found: dict[str, str] = {}
    if isinstance(settings, Kind) and not type(settings).__module__.startswith(OURS):
        source = inspect.getsourcefile(type(settings))
        content = Path(source).read_bytes() if source and Path(source).is_file() else b""
        found[_full_name(type(settings))] = hashlib.sha256(content).hexdigest()
    if isinstance(settings, Settings):
        settings = [getattr(settings, name) for name in type(settings).model_fields]
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for part in settings:
            found |= foreign_code(part)
    return found


def _base(kind: type[Kind]) -> type[Any]:
    """The base below the root that a kind derives from."""
    return next(c for c in kind.__mro__ if c.__base__ is Kind)


def _full_name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _below(base: type[Any]) -> list[type[Any]]:
    return [kind for direct in base.__subclasses__() for kind in (direct, *_below(direct))]


def _is_kind(cls: type[Any]) -> bool:
    """The class, or one it derives from, says its own name; the root and the bases do not."""
    below_root = (c for c in cls.__mro__ if issubclass(c, Settings) and c.__base__ is not Settings)
    return any("kind" in vars(c).get("__annotations__", {}) for c in below_root)


def _names(kind: type[Kind]) -> tuple[str, ...]:
    return get_args(kind.model_fields["kind"].annotation) if _is_kind(kind) else ()
