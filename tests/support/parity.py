"""Small jobs that show one ability of Dagster each, under two executors: whatever runs them, they have to go alike.

`reference` runs the steps in the process of their run, `delegating` makes each a task of its own. The
definitions are the same objects. Nothing here sleeps, but for the delays of the retries.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import dagster as dg

from dagster_taskiq import taskiq_executor

MARKS_TAG = "marks"
"""Tag of a run: the file in which its processes write down what no event tells."""

SOON = dg.RetryPolicy(max_retries=2, delay=0.2)


def mark(run: dg.DagsterRun | None, text: str) -> None:
    assert run is not None
    with Path(run.tags[MARKS_TAG]).open("a") as file:
        file.write(f"{text}\n")


# ---------------------------------------------------------------------------------------------- resources


@dg.resource
@contextmanager
def connection(context: dg.InitResourceContext) -> Iterator[str]:
    mark(context.run, "set up")
    try:
        yield "connected"
    finally:
        mark(context.run, "torn down")


class Session(dg.ConfigurableResource[None]):
    """The same in Dagster's newer style, on top of another resource."""

    name: str
    connection: dg.ResourceDependency[str]

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        mark(context.run, "set up")

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        mark(context.run, "torn down")


@dg.resource
def broken(_: dg.InitResourceContext) -> str:
    raise ConnectionError("nobody listens")


# ------------------------------------------------------------------------------------------------ op jobs


@dg.op
def seventeen() -> int:
    return 17


@dg.op
def five() -> int:
    return 5


@dg.op(out={"quotient": dg.Out(int), "remainder": dg.Out(int)})
def divide(dividend: int, divisor: int) -> tuple[int, int]:
    return divmod(dividend, divisor)


@dg.op
def as_text(quotient: int, remainder: int, unit: str = "pieces") -> str:
    return f"{quotient} {unit}, {remainder} left"


@dg.op
async def add_one(number: int) -> int:
    return number + 1


@dg.op
def total(numbers: list[int]) -> int:
    return sum(numbers)


@dg.job
def several_inputs_and_outputs() -> None:
    quotient, remainder = divide(seventeen(), five())
    as_text(quotient, add_one(remainder))


@dg.op(out={"value": dg.Out(dict[str, int], metadata={"unit": "words"})})
def counts_words() -> Iterator[dg.Output[dict[str, int]]]:
    yield dg.Output({"a": 1, "b": 2}, output_name="value", metadata={"words": 2, "kind": dg.MetadataValue.text("x")})


@dg.op
def largest(words: dict[str, int]) -> str:
    return max(words, key=lambda word: words[word])


@dg.job
def values_with_metadata() -> None:
    largest(counts_words())


@dg.op
def expects_and_observes(context: dg.OpExecutionContext) -> int:
    context.log_event(dg.ExpectationResult(success=True, label="not_empty", metadata={"rows": 3}))
    context.log_event(dg.AssetObservation("a_table", metadata={"rows": 3}))
    context.log_event(dg.AssetMaterialization("a_table", metadata={"rows": 3}, partition="monday"))
    context.add_output_metadata({"rows": 3})
    return 3


@dg.job
def events_of_a_step() -> None:
    expects_and_observes()


class Greeting(dg.Config):
    name: str
    times: int = 2
    nested: dict[str, list[int]]


@dg.op
def greets(config: Greeting, end: str) -> str:
    return f"{config.name} " * config.times + str(config.nested) + end


@dg.job
def op_config() -> None:
    greets()


@dg.graph
def increment_twice(number: int) -> Any:
    return add_one.alias("second")(add_one.alias("first")(number))


@dg.graph(out={"small": dg.GraphOut(), "large": dg.GraphOut()})
def four_times(number: int) -> dict[str, Any]:
    small: Any = increment_twice.alias("inner")(number)
    return {"small": small, "large": increment_twice.alias("outer")(small)}


@dg.job
def nested_graphs() -> None:
    small, large = cast(Any, four_times(five()))
    divide(large, small)


@dg.op(out={"left": dg.Out(int, is_required=False), "right": dg.Out(int, is_required=False)})
def fork_in_the_road() -> Iterator[dg.Output[int]]:
    yield dg.Output(1, "right")


@dg.job
def conditional_branch() -> None:
    left, right = fork_in_the_road()
    add_one.alias("after_left_2")(add_one.alias("after_left")(left))
    add_one.alias("after_right_2")(add_one.alias("after_right")(right))


@dg.job
def fan_in_with_skips() -> None:
    left, right = fork_in_the_road()
    total.alias("some")([add_one.alias("after_left")(left), add_one.alias("after_right")(right), seventeen()])
    total.alias("none")([left, add_one.alias("after_left_too")(left)])


class Range(dg.Config):
    size: int = 3


@dg.op(out=dg.DynamicOut(int))
def numbers(config: Range) -> Iterator[dg.DynamicOutput[int]]:
    for number in range(config.size):
        yield dg.DynamicOutput(number, mapping_key=f"n{number}")


@dg.job
def dynamic_mapping_and_collect() -> None:
    total(numbers().map(add_one).collect())


@dg.job
def dynamic_mapping_of_two_ops_in_chain() -> None:
    total(numbers().map(lambda number: add_one.alias("then")(add_one(number))).collect())


@dg.job
def empty_dynamic_output() -> None:
    total(numbers().map(add_one).collect())


@dg.op
def fails_on_one(number: int) -> int:
    if number == 1:
        raise ValueError("not this one")
    return number


@dg.job
def dynamic_mapping_with_a_failure() -> None:
    total(numbers().map(fails_on_one).collect())


@dg.op(retry_policy=SOON)
def succeeds_at_the_second_attempt(context: dg.OpExecutionContext, number: int) -> int:
    context.log.info("attempt %d", context.retry_number)
    if context.retry_number == 0:
        raise ConnectionError("not yet")
    return number


@dg.job
def dynamic_mapping_with_retries() -> None:
    total(numbers().map(succeeds_at_the_second_attempt).collect())


@dg.job
def retry_policy_that_helps() -> None:
    add_one(succeeds_at_the_second_attempt(five()))


@dg.op(retry_policy=SOON)
def never_succeeds(context: dg.OpExecutionContext) -> int:
    raise ConnectionError(f"not at attempt {context.retry_number}")


@dg.job
def retry_policy_that_exhausts() -> None:
    add_one(never_succeeds())


@dg.op
def always_fails() -> int:
    raise ValueError("as it should")


@dg.job(op_retry_policy=dg.RetryPolicy(max_retries=1, delay=0.2, backoff=dg.Backoff.EXPONENTIAL))
def retry_policy_of_the_job() -> None:
    add_one(always_fails())


@dg.op
def asks_for_a_retry(context: dg.OpExecutionContext) -> int:
    if context.retry_number < 1:
        raise dg.RetryRequested(max_retries=1, seconds_to_wait=0.2) from ConnectionError("busy")
    return context.retry_number


@dg.op
def asks_for_a_retry_at_once(context: dg.OpExecutionContext) -> int:
    raise dg.RetryRequested(max_retries=1)


@dg.job
def retry_requested() -> None:
    add_one.alias("after_success")(asks_for_a_retry())
    add_one.alias("after_failure")(asks_for_a_retry_at_once())


@dg.op(retry_policy=SOON)
def gives_up() -> int:
    raise dg.Failure("no use to try again", metadata={"reason": "gone", "code": 7}, allow_retries=False)


@dg.job
def failure_that_allows_no_retries() -> None:
    gives_up()


@dg.op
def fails_with_a_cause() -> int:
    try:
        return int("the cause")
    except ValueError as error:
        raise KeyError("the consequence") from error


@dg.job
def failure_beside_an_independent_branch() -> None:
    add_one.alias("never_2")(add_one.alias("never")(fails_with_a_cause()))
    add_one.alias("still_2")(add_one.alias("still")(five()))


@dg.op
def returns_the_wrong_type() -> int:
    return "text"  # type: ignore[return-value]


@dg.op(out={"first": dg.Out(int), "second": dg.Out(int)})
def forgets_an_output() -> Iterator[dg.Output[int]]:
    yield dg.Output(1, "first")


@dg.job
def wrong_and_missing_outputs() -> None:
    add_one.alias("never")(returns_the_wrong_type())
    first, second = forgets_an_output()
    add_one.alias("of_first")(first)
    add_one.alias("of_second")(second)


@dg.success_hook(required_resource_keys={"connection"})
def praises(context: dg.HookContext) -> None:
    context.log.info("%s: %s, %s", context.step_key, context.op_output_values, context.resources.connection)


@dg.failure_hook
def blames(context: dg.HookContext) -> None:
    context.log.error("%s: %r", context.op.name, context.op_exception)


@dg.success_hook
def trips(context: dg.HookContext) -> None:
    raise RuntimeError(f"a hook of {context.op.name} fell over")


@dg.job(hooks={praises, blames})
def hooks_of_the_job() -> None:
    add_one(five())
    always_fails()
    succeeds_at_the_second_attempt(seventeen())


@dg.job
def hooks_of_ops() -> None:
    with_hooks = five.with_hooks({praises, blames})
    add_one(with_hooks())
    always_fails.with_hooks({blames})()
    always_fails.alias("not_blamed").with_hooks({praises})()


@dg.job
def hook_that_fails() -> None:
    add_one(five.with_hooks({trips})())


@dg.op(required_resource_keys={"connection"})
def asks(context: dg.OpExecutionContext) -> str:
    return str(context.resources.connection)


@dg.op
def talks(session: Session, said: str) -> str:
    return f"{session.name}: {said}"


@dg.op(required_resource_keys={"connection"})
def fails_while_connected(said: str) -> None:
    raise ValueError(f"while {said}")


@dg.job
def resources_with_teardown() -> None:
    said = asks()
    talks(said)
    fails_while_connected(said)


@dg.op(required_resource_keys={"broken", "connection"})
def needs_what_is_broken() -> int:
    return 1


@dg.job
def resource_that_fails_to_initialise() -> None:
    add_one(needs_what_is_broken())


@dg.op(pool="narrow")
def one_at_a_time(context: dg.OpExecutionContext) -> int:
    mark(context.run, "enters")
    mark(context.run, "leaves")
    return 1


@dg.job
def concurrency_pool() -> None:
    total([one_at_a_time.alias(name)() for name in ("a", "b", "c")])


@dg.op(ins={"first": dg.In(dg.Nothing), "second": dg.In(dg.Nothing)})
def afterwards() -> int:
    return 2


@dg.op(out=dg.Out(dg.Nothing))
def no_value() -> None:
    pass


@dg.job
def nothing_dependencies() -> None:
    afterwards(first=no_value(), second=five())


@dg.job
def priorities() -> None:
    for name, priority in {"low": "-1", "usual": "0", "high": "3", "higher": "7"}.items():
        five.alias(name).tag({"dagster/priority": priority})()


@dg.op
def logs(context: dg.OpExecutionContext) -> int:
    for number, level in enumerate(("debug", "info", "warning", "error", "critical")):
        getattr(context.log, level)("line %d", number)
    context.log.info("two\nlines and ünicode")
    dg.get_dagster_logger("of_a_library").info("from elsewhere")
    return 1


@dg.job
def log_messages() -> None:
    add_one(logs())
    logs.alias("logs_too")()


@dg.op
def fails_in_the_first_run(context: dg.OpExecutionContext, number: int) -> int:
    if context.run.parent_run_id is None and number == 1:
        raise ConnectionError("not in the first run")
    return number * 10


@dg.op
def no_number() -> int:
    return 0


@dg.job
def re_execution_from_failure() -> None:
    one = add_one.alias("one")(no_number())
    total([fails_in_the_first_run(one), add_one(fails_in_the_first_run.alias("goes_well")(five()))])


@dg.job
def re_execution_of_a_dynamic_mapping() -> None:
    total(numbers().map(lambda number: add_one(fails_in_the_first_run(number))).collect())


@dg.job
def op_selection() -> None:
    quotient, remainder = divide(seventeen(), five())
    as_text(add_one(quotient), remainder)


# ------------------------------------------------------------------------------------------------- assets


@dg.asset(code_version="1")
def raw() -> list[int]:
    return [1, 2, 3]


@dg.asset(code_version="1", metadata={"owner": "us"})
def doubled(context: dg.AssetExecutionContext, raw: list[int]) -> list[int]:
    context.add_output_metadata({"rows": len(raw)})
    return [2 * number for number in raw]


@dg.asset(code_version="2", deps=[doubled])
def report(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    context.log.info("selected: %s", sorted(key.to_user_string() for key in context.selected_asset_keys))
    return dg.MaterializeResult(metadata={"pages": 2})


@dg.asset(output_required=False)
def may_be_left_out() -> Iterator[dg.Output[int]]:
    yield from ()


@dg.asset
def has_nothing_to_do(may_be_left_out: int) -> int:
    return may_be_left_out


@dg.multi_asset(outs={"left_part": dg.AssetOut(), "right_part": dg.AssetOut()})
def parts() -> tuple[int, int]:
    return 1, 2


@dg.asset
def whole(left_part: int, right_part: int) -> int:
    return left_part + right_part


@dg.multi_asset(specs=[dg.AssetSpec(name, skippable=True) for name in ("north", "south", "west")], can_subset=True)
def directions(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
    for key in sorted(context.selected_asset_keys):
        yield dg.MaterializeResult(asset_key=key, metadata={"of": len(context.selected_asset_keys)})


days = dg.StaticPartitionsDefinition(["monday", "tuesday"])


@dg.asset(partitions_def=days)
def takings(context: dg.AssetExecutionContext) -> str:
    return str(context.partition_key)


@dg.asset(partitions_def=days)
def balance(context: dg.AssetExecutionContext, takings: str) -> str:
    return f"{takings} of {context.partition_key}"


@dg.asset(check_specs=[dg.AssetCheckSpec("inline", asset="checked")])
def checked() -> Iterator[dg.Output[int] | dg.AssetCheckResult]:
    yield dg.Output(3)
    yield dg.AssetCheckResult(passed=True, check_name="inline", metadata={"seen": 3})


@dg.asset_check(asset=checked)
def is_positive(checked: int) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=checked > 0, metadata={"value": checked})


@dg.asset_check(asset=checked)
def is_even(checked: int) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=checked % 2 == 0, severity=dg.AssetCheckSeverity.WARN, description="it is odd")


@dg.asset_check(asset=checked)
def cannot_tell(checked: int) -> dg.AssetCheckResult:
    raise ValueError(f"no idea of {checked}")


@dg.asset
def guarded() -> int:
    return -1


@dg.asset_check(asset=guarded, blocking=True)
def keeps_others_out(guarded: int) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=guarded > 0, metadata={"value": guarded})


@dg.asset
def behind_the_guard(guarded: int) -> int:
    return guarded


@dg.asset
def beside_the_guard() -> int:
    return 1


@dg.graph_asset
def of_a_graph() -> Any:
    return increment_twice(five())


@dg.asset
def from_the_graph(of_a_graph: int) -> int:
    return of_a_graph


with warnings.catch_warnings(action="ignore", category=dg.BetaWarning):

    @dg.multi_observable_source_asset(specs=[dg.AssetSpec("watched"), dg.AssetSpec("watched_too")])  # type: ignore[untyped-decorator]
    def watched() -> Iterator[dg.ObserveResult]:
        yield dg.ObserveResult("watched", metadata={"rows": 3}, data_version=dg.DataVersion("7"))
        yield dg.ObserveResult("watched_too")


@dg.asset(retry_policy=SOON)
def at_the_second_attempt(context: dg.AssetExecutionContext) -> int:
    if context.op_execution_context.retry_number == 0:
        raise ConnectionError("not yet")
    return 1


OP_JOBS = [
    several_inputs_and_outputs,
    values_with_metadata,
    events_of_a_step,
    op_config,
    nested_graphs,
    conditional_branch,
    fan_in_with_skips,
    dynamic_mapping_and_collect,
    dynamic_mapping_of_two_ops_in_chain,
    empty_dynamic_output,
    dynamic_mapping_with_a_failure,
    dynamic_mapping_with_retries,
    retry_policy_that_helps,
    retry_policy_that_exhausts,
    retry_policy_of_the_job,
    retry_requested,
    failure_that_allows_no_retries,
    failure_beside_an_independent_branch,
    wrong_and_missing_outputs,
    hooks_of_the_job,
    hooks_of_ops,
    hook_that_fails,
    resources_with_teardown,
    resource_that_fails_to_initialise,
    concurrency_pool,
    nothing_dependencies,
    priorities,
    log_messages,
    re_execution_from_failure,
    re_execution_of_a_dynamic_mapping,
    op_selection,
]

ASSET_JOBS = [
    dg.define_asset_job("assets_with_dependencies", [raw, doubled, report]),
    dg.define_asset_job("asset_selection", [raw, doubled, report]),
    dg.define_asset_job("asset_without_a_value", [may_be_left_out, has_nothing_to_do]),
    dg.define_asset_job("multi_asset", [parts, whole]),
    dg.define_asset_job("subset_of_a_multi_asset", [directions]),
    dg.define_asset_job("partitioned_assets", [takings, balance]),
    dg.define_asset_job("asset_checks", [checked]),
    dg.define_asset_job("blocking_asset_check", [guarded, behind_the_guard, beside_the_guard]),
    dg.define_asset_job("asset_of_a_graph", [of_a_graph, from_the_graph]),
    dg.define_asset_job("asset_with_retries", [at_the_second_attempt]),
    dg.define_asset_job("observation_of_sources", [watched]),
]


def _under(executor: dg.ExecutorDefinition) -> dg.Definitions:
    return dg.Definitions(
        executor=executor,
        jobs=[*OP_JOBS, *ASSET_JOBS],
        assets=[
            raw,
            doubled,
            report,
            may_be_left_out,
            has_nothing_to_do,
            parts,
            whole,
            directions,
            takings,
            balance,
            checked,
            guarded,
            behind_the_guard,
            beside_the_guard,
            of_a_graph,
            from_the_graph,
            watched,
            at_the_second_attempt,
        ],
        asset_checks=[is_positive, is_even, cannot_tell, keeps_others_out],
        resources={
            "io_manager": dg.FilesystemIOManager.configure_at_launch(),
            "connection": connection,
            "session": Session(name="session", connection=connection),
            "broken": broken,
        },
    )


reference = _under(dg.in_process_executor)
delegating = _under(taskiq_executor)
# Only for what happens before a step begins: in one process that is the run's failure, and no step's.
in_processes = _under(dg.multiprocess_executor)
