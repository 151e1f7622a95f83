"""Read YAML as people mean it: ``on``, ``off``, ``yes`` and ``no`` are words.

PyYAML follows YAML 1.1, where they are booleans, so that ``distil: {on: ood}`` would have the key
True and ``autocast: off`` the value False. YAML 1.2 knows ``true`` and ``false`` alone.
"""

import re
from typing import Any, Final

import yaml

BOOLEAN: Final = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the booleans of YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOLEAN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def read_yaml(text: str) -> Any:
    """Plain values.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=_Loader)
