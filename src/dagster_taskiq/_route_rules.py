"""Which runs go to which route, as the configuration says it: the setting `routes`. Knows texts, not Dagster."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from dagster_taskiq.errors import SettingsError
from dagster_taskiq.queue_names import DEFAULT_ROUTE, ROUTE_RULE, is_route

_CONDITIONS: Final = ("code_location", "job", "tag")
_EXAMPLE: Final = "{route: gpu, job: 'train_*'}"


@dataclass(frozen=True, slots=True)
class RouteRule:
    """One rule: all of its conditions have to be true, and it has at least one. `*` and `?` as in the names of files.

    `tag` is a tag's name, or name and value with `=` between them.
    """

    route: str
    code_location: str | None = None
    job: str | None = None
    tag: str | None = None

    def matches(self, code_location: str | None, job: str, tags: Mapping[str, str]) -> bool:
        """Whether it is about a run of that job, in that code location, with those tags."""
        if self.code_location is not None and not fnmatchcase(code_location or "", self.code_location):
            return False
        if self.job is not None and not fnmatchcase(job, self.job):
            return False
        if self.tag is None:
            return True
        name, _, value = self.tag.partition("=")
        return name in tags and (not value or fnmatchcase(tags[name], value))


def first_match(rules: Iterable[RouteRule], code_location: str | None, job: str, tags: Mapping[str, str]) -> str | None:
    """The route of the first rule that matches; None: none does."""
    return next((rule.route for rule in rules if rule.matches(code_location, job, tags)), None)


def rules_of(key: str, value: Any) -> tuple[RouteRule, ...]:
    """The rules in a list of mappings. Raises `SettingsError`."""
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise SettingsError(f"{key} must be a list of rules, each as {_EXAMPLE}")
    return tuple(rule if isinstance(rule, RouteRule) else _rule_of(key, rule) for rule in value)


def _rule_of(key: str, given: Any) -> RouteRule:
    if not isinstance(given, Mapping) or not set(given) <= {"route", *_CONDITIONS}:
        raise SettingsError(f"{key} must be a list of rules, each as {_EXAMPLE}; not {given!r}")
    conditions = {name: given[name] for name in _CONDITIONS if given.get(name) is not None}
    if not conditions or not all(isinstance(text, str) and text for text in conditions.values()):
        raise SettingsError(
            f"{key}: a rule needs a condition, {', '.join(_CONDITIONS)}, with a text as its value; not {dict(given)!r}"
        )
    return RouteRule(route_of(key, given.get("route")), **conditions)


def route_of(key: str, value: object) -> str:
    """The name of a route. Raises `SettingsError`."""
    if not is_route(value):
        raise SettingsError(
            f"{key}: {value!r} is not the name of a route: {ROUTE_RULE}; the unnamed one is called {DEFAULT_ROUTE}"
        )
    return str(value)


def routes_of(key: str, value: Any) -> tuple[str, ...]:
    """Names of routes, in a list or in a text with commas; each once, in their order. Raises `SettingsError`."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not hasattr(names, "__iter__") or isinstance(names, Mapping):
        raise SettingsError(f"{key} must be a list of routes, not {value!r}")
    found = tuple(dict.fromkeys(route_of(key, name) for name in names))
    if not found:
        raise SettingsError(f"{key} must name a route at least; the unnamed one is called {DEFAULT_ROUTE}")
    return found


def limits_of(key: str, value: Any) -> dict[str, int]:
    """Limits by route, from a mapping of whole numbers, at least 1. Raises `SettingsError`."""
    if not isinstance(value, Mapping):
        raise SettingsError(f"{key} must be a mapping of routes to numbers, as {{gpu: 2}}; not {value!r}")
    for route, limit in value.items():
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise SettingsError(f"{key}: the limit of {route} must be a whole number, at least 1, not {limit!r}")
    return {route_of(key, route): limit for route, limit in value.items()}
