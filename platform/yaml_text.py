"""Read YAML as people mean it: ``on`` and ``off`` are words, and a key stands once.

PyYAML follows YAML 1.1, where they are booleans, so that ``distil: {on: ood}`` would have the key
True and ``autocast: off`` the value False. YAML 1.2 knows ``true`` and ``false`` alone.

Of a key that stands twice PyYAML silently takes the last, so that a whole section may be lost.
YAML forbids it.
"""

import re
from typing import Any, Final

import yaml

BOOLEAN: Final = "tag:yaml.org,2002:bool"
MERGE: Final = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the booleans of YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOLEAN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Each key once; what ``<<`` brings in may be overridden."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if (name := (key.tag, key.value)) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(name)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


_Loader.add_implicit_resolver(BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def read_yaml(text: str) -> Any:
    """Plain values.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping has a key twice.
    """
    return yaml.load(text, Loader=_Loader)
