"""`--where`: what it can say of a run, and what it says of an expression that is wrong."""

import re

import pytest

from dagster_taskiq.errors import QueryError
from dagster_taskiq.run_where import SAMPLE, Tags, where

RUN = {
    **SAMPLE,
    "job": "load_orders",
    "tags": Tags({"team": "Data", "tries": "4"}),
    "age": 7_300.0,
    "assets": ["raw/orders", "prices"],
    "partition": "2026-11-29",
}


@pytest.mark.parametrize(
    "expression",
    [
        "job == 'load_orders' and status != 'QUEUED'",
        " job.startswith('load') and not job.endswith('x')",
        "age > hours(2) and age < hours(2) + minutes(5) and age < days(1)",
        "tags['team'].lower() in ('data', 'web') and tags['nothing'] == '' and 'nothing' not in tags",
        "number(tags['tries']) >= 4 and number(tags['nothing']) == 0",
        "'raw/orders' in assets and len(assets) == 2",
        "'2026-11-01' <= partition < '2026-12-01'",
        "tags.get('team', '-') == 'Data' or\njob == 'x'",
    ],
)
def test_it_is_true(expression: str) -> None:
    assert where(expression)(RUN) is True
    assert where(f"not ({expression})")(RUN) is False


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "--where is empty; for instance: "),
        ("job ==", "character 1 ('job =='): invalid syntax"),
        ("job == 'é' and jbo == 'x'", "character 16 (\"jbo == 'x'\"): there is no jbo; there are run_id, job, "),
        ("job == 'x' and age > '2'", "character 16 (\"age > '2'\"): '>' not supported between"),
        ("status", "it is 'STARTED', not true or false; compare it"),
        ("job == 'x' or nope", "there is no nope"),
        ("job.format(1) == ''", "there is no .format; there are endswith, "),
        ("tags.pop('a') == ''", "there is no .pop"),
        ("job.__class__ == 1", "there is no .__class__"),
        ("days(days('aa')) == ''", "only numbers can be multiplied, not 'aa'"),
        ("[[0] * 99999] * 99999 == [[1] * 99999] * 99999", "only numbers can be multiplied, not [0]"),
        ("open('/etc/passwd') == 1", "open cannot be called so; there are number, len, "),
        ("(lambda: 1)() == 1", "cannot be called so"),
        ("[x for x in tags] == []", "ListComp is not offered here"),
        ("2 ** 99999 == 1", "the operator Pow is not offered here"),
        ("(" * 900, "too many nested parentheses"),
        ("x" * 3_000, "--where has 3,000 characters; 2,000 at most"),
    ],
)
def test_what_is_wrong_is_said_before_any_run_is_looked_at(expression: str, said: str) -> None:
    with pytest.raises(QueryError, match=re.escape(said)) as raised:
        where(expression)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("number(tags['team']) > 3", "could not convert string to float: 'Data'"),
        ("1 / number(tags['nothing']) == 1", "division by zero"),
    ],
)
def test_what_one_run_makes_wrong_is_said_when_it_comes(expression: str, said: str) -> None:
    with pytest.raises(QueryError, match=said):
        where(expression)(RUN)
