"""What CloudFormation makes of a template's texts, for what the emulator does not create: alarms, scaling.

Knows the few functions that the templates in `infra/` use. What comes from elsewhere stays a text in angle brackets.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """`!Ref x` is read as `{"Ref": "x"}`, and so is each function."""


def _tagged(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return {tag: loader.construct_scalar(node)}
    if isinstance(node, yaml.SequenceNode):
        return {tag: loader.construct_sequence(node, deep=True)}
    assert isinstance(node, yaml.MappingNode)
    return {tag: loader.construct_mapping(node, deep=True)}


_Loader.add_multi_constructor("!", _tagged)


class Filled:
    """A template with its parameters filled in."""

    def __init__(self, path: Path, **parameters: str) -> None:
        self._template: Any = yaml.load(path.read_text(), _Loader)  # noqa: S506 - a SafeLoader
        defaults = {name: str(one.get("Default", f"<{name}>")) for name, one in self._template["Parameters"].items()}
        assert parameters.keys() <= defaults.keys() | {"AWS::StackName"}
        self._known = defaults | parameters

    def resources(self) -> Mapping[str, Any]:
        """Those whose condition holds, by their logical names."""
        every = self._template["Resources"]
        return {
            name: self._value(one)
            for name, one in every.items()
            if "Condition" not in one or self._is(one["Condition"])
        }

    def _is(self, condition: str) -> bool:
        return self._value(self._template["Conditions"][condition]) is True

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [one for one in map(self._value, value) if one is not None]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((name, given),) = value.items()
            function = getattr(self, f"_{name.removeprefix('Fn::').lower()}", None)
            if function is not None and name[0].isupper():
                return function(given)
        return {key: found for key, one in value.items() if (found := self._value(one)) is not None}

    def _ref(self, name: str) -> str | None:
        return None if name == "AWS::NoValue" else self._known.get(name, f"<{name}>")

    def _getatt(self, name: str) -> str:
        return f"<{name}>"

    def _importvalue(self, name: Any) -> str:
        return f"<import {self._value(name)}>"

    def _if(self, given: list[Any]) -> Any:
        return self._value(given[1] if self._is(given[0]) else given[2])

    def _not(self, given: list[Any]) -> bool:
        return self._value(given[0]) is not True

    def _or(self, given: list[Any]) -> bool:
        return any(self._value(one) is True for one in given)

    def _equals(self, given: list[Any]) -> bool:
        one, other = map(self._value, given)
        return bool(one == other)

    def _split(self, given: list[Any]) -> list[str]:
        return str(self._value(given[1])).split(given[0])

    def _select(self, given: list[Any]) -> Any:
        listed = self._value(given[1])
        return listed[given[0]] if given[0] < len(listed) else ""

    def _join(self, given: list[Any]) -> str:
        return str(given[0]).join(map(str, self._value(given[1])))

    def _sub(self, given: Any) -> str:
        text, own = given if isinstance(given, list) else (given, {})
        known = {name: self._value(one) for name, one in own.items()}
        return re.sub(r"\$\{([^}]+)\}", lambda found: str(known.get(found[1], self._ref(found[1]))), text)
