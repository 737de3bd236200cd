"""An expression over the attributes of a run, as a person types it: `job.startswith('load') and age > hours(2)`.

Knows values by their names, and simpleeval, which evaluates them; not where they come from. Nothing else can be called
or reached: no names but those of the run, no methods but those listed here.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

from simpleeval import DEFAULT_OPERATORS, InvalidExpression, SimpleEval

from dagster_taskiq.errors import QueryError

_LONGEST: Final = 2_000


def _product(one: Any, other: Any) -> Any:
    """Of numbers. A few characters can make a text, or a list of lists, that no memory can hold."""
    for factor in (one, other):
        if not isinstance(factor, int | float):
            raise TypeError(f"only numbers can be multiplied, not {repr(factor)[:40]}")
    return one * other


_OPERATORS: Final = {
    kind: DEFAULT_OPERATORS[kind]
    for kind in (
        ast.Add, ast.Sub, ast.Div, ast.USub, ast.Not, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In,
        ast.NotIn,
    )
} | {ast.Mult: _product}  # fmt: skip
_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "number": lambda text: float(text or 0),
    "len": len,
    "minutes": lambda count: _product(count, 60),
    "hours": lambda count: _product(count, 3_600),
    "days": lambda count: _product(count, 86_400),
}


class Tags(dict[str, str]):
    """A run's tags. One that the run does not have is an empty text."""

    def __missing__(self, key: str) -> str:
        """What `tags['team']` is for a run without that tag."""
        return ""


_METHODS: Final[Mapping[type, set[str]]] = {str: {"startswith", "endswith", "lower", "upper"}, Tags: {"get"}}
SAMPLE: Final[Mapping[str, Any]] = {
    "run_id": "00000000-0000-0000-0000-000000000000",
    "job": "job",
    "status": "STARTED",
    "tags": Tags(),
    "partition": "",
    "age": 60.0,
    "location": "",
    "assets": ["asset"],
    "schedule": "",
    "sensor": "",
    "backfill": "",
}
"""The attributes that an expression may name, each with a value of its type."""


@lru_cache(maxsize=32)
def where(expression: str) -> Callable[[Mapping[str, Any]], bool]:
    """A function that says of the attributes of a run whether the expression is true.

    Raises `QueryError`, which names the place, when it is no such expression: an unknown name, an operator or a method
    that is not offered, types that cannot be compared. Its function raises that, too.
    """
    expression = " ".join(expression.splitlines()).strip()
    if not expression:
        raise QueryError("--where is empty; for instance: --where \"job.startswith('load') and age > hours(2)\"")
    if len(expression) > _LONGEST:
        raise QueryError(f"--where has {len(expression):,} characters; {_LONGEST:,} at most")
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        offset = getattr(error, "offset", None) or 1
        message = getattr(error, "msg", None) or str(error) or "too deep"
        raise _error(expression, offset, message) from None
    checker = _Evaluator(expression, SAMPLE)
    for node in ast.walk(tree):
        checker.check(node)

    def is_true(attributes: Mapping[str, Any]) -> bool:
        found = _Evaluator(expression, attributes).evaluate(tree)
        if not isinstance(found, bool):
            raise _error(expression, 1, f"it is {repr(found)[:40]}, not true or false; compare it")
        return found

    for part in _parts(tree):
        with suppress(_ValueTrouble):
            checker.evaluate(part)
    with suppress(_ValueTrouble):
        is_true(SAMPLE)
    return is_true


def _parts(tree: ast.expr) -> Iterator[ast.expr]:
    """What `and` and `or` may skip."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BoolOp):
            yield from node.values


class _ValueTrouble(QueryError):
    """What an expression makes of one value, and may not make of another one."""


class _Evaluator(SimpleEval):  # type: ignore[misc]
    """With lists, without anything that is not needed, and with the place of every error."""

    nodes: dict[type[ast.AST], Callable[[Any], Any]]

    def __init__(self, expression: str, attributes: Mapping[str, Any]) -> None:
        super().__init__(_OPERATORS, dict(_FUNCTIONS), attributes, _METHODS)
        self._expression = expression
        kept: tuple[type[ast.expr], ...] = (
            ast.Name,
            ast.UnaryOp,
            ast.BinOp,
            ast.BoolOp,
            ast.Compare,
            ast.Call,
            ast.Subscript,
            ast.Attribute,
        )
        self.nodes = {kind: self.nodes[kind] for kind in (*kept, ast.Constant)}
        self.nodes[ast.Tuple] = self.nodes[ast.List] = lambda node: [self._eval(item) for item in node.elts]

    def check(self, node: ast.AST) -> None:
        """Before anything is evaluated: what `and` and `or` skip is to be right as well."""
        if isinstance(node, ast.Name) and node.id not in {*SAMPLE, *_FUNCTIONS}:
            raise self._at(node, f"there is no {node.id}; there are {', '.join(SAMPLE)}")
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Attribute):
            called = getattr(node.func, "id", "this")
            if called not in _FUNCTIONS or node.keywords:
                raise self._at(node, f"{called} cannot be called so; there are {', '.join(_FUNCTIONS)}")
        if isinstance(node, ast.Attribute) and not any(node.attr in methods for methods in _METHODS.values()):
            offered = ", ".join(sorted(set().union(*_METHODS.values())))
            raise self._at(node, f"there is no .{node.attr}; there are {offered}")
        if isinstance(node, ast.expr) and type(node) not in self.nodes:
            raise self._at(node, f"{type(node).__name__} is not offered here")
        operators = node.ops if isinstance(node, ast.Compare) else [getattr(node, "op", ast.Not())]
        for operator in operators:
            if not isinstance(operator, (ast.And, ast.Or, *_OPERATORS)):
                raise self._at(node, f"the operator {type(operator).__name__} is not offered here")

    def evaluate(self, tree: ast.expr) -> object:
        return self.eval(self._expression, tree)

    def _eval(self, node: Any) -> Any:
        try:
            return super()._eval(node)
        except QueryError:
            raise
        except (ValueError, ArithmeticError, LookupError) as error:
            raise self._at(node, str(error), _ValueTrouble) from None
        except (InvalidExpression, TypeError, RecursionError) as error:
            raise self._at(node, str(error) or type(error).__name__) from None

    def _at(self, node: ast.AST, what: str, kind: type[QueryError] = QueryError) -> QueryError:
        offset: int = getattr(node, "col_offset", 0)
        column = len(self._expression.encode()[:offset].decode(errors="ignore")) + 1
        return _error(self._expression, column, what, kind)


def _error(expression: str, column: int, what: str, kind: type[QueryError] = QueryError) -> QueryError:
    from_here = expression[column - 1 : column + 19]
    return kind(f"--where, character {column} ({from_here!r}): {what}")
