"""YAML that a person wrote: plain values, each key once, and no more than a person writes.

An alias counts as all that it stands for and may not stand inside its own anchor, so nothing read here grows when it
is merged, walked or printed.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

_BYTES, _NODES, _DEPTH = 2**20, 30_000, 50
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def _refusal(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._begun = 0
        self._sizes: dict[int, int] = {}  # of the nodes that are whole, with all that they hold

    def compose_node(self, parent: Any, index: Any) -> Any:
        begun = self.peek_event()
        self._depth, self._begun = self._depth + 1, self._begun + 1
        if self._depth > _DEPTH:
            raise _refusal(f"it is nested more than {_DEPTH} deep", begun)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(begun, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _refusal("an alias refers to itself", begun)
            return node
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        items = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in pairs for each in pair]
        self._sizes[id(node)] = size = 1 + sum(self._sizes[id(item)] for item in items)
        if max(size, self._begun) > _NODES:
            raise _refusal(f"it holds more than {_NODES:,} values", begun)
        keys = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise _refusal(f"the key {key!r} stands twice", begun)
        return node


class _WordLoader(_Loader):
    """Leaves ``yes`` and ``7`` the words they are."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


# 1e-4 is text in YAML 1.1 and a number to everybody.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, [*"-+0123456789"])


def _as_written(loader: _Loader, node: yaml.ScalarNode) -> float:
    """A number; not 010, which YAML 1.1 reads as 8, nor 1:30, which it reads as 90."""
    if ":" in node.value or re.match(r"[-+]?0[\d_]+$", node.value):
        raise _refusal(f"{node.value} is no number: write it without zeros before it and without colons", node)
    return loader.construct_yaml_int(node) if node.tag.endswith("int") else loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _as_written)


def parse_yaml(text: str, words: bool = False) -> Any:
    """The values of ``text``; with ``words`` every scalar is a string. Raises ValueError of one line."""
    try:
        return yaml.load(text, _WordLoader if words else _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ValueError(", ".join(filter(None, (error.context, error.problem))) + line) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        raise ValueError(" ".join(str(error).split())) from error


def read_yaml(path: Path, words: bool = False) -> Any:
    """The values of a file. Raises ValueError of one line, without the file's name, and OSError."""
    with path.open("rb") as file:
        held = file.read(_BYTES + 1)
    if len(held) > _BYTES:
        raise ValueError(f"it has more than {_BYTES:,} bytes")
    try:
        return parse_yaml(held.decode("utf-8-sig"), words)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
