"""The error of a step that was interrupted: what has happened, and where in the user's code; not where in Dagster's.

Dagster makes it of the exception, with a page of its own frames and none of the reason. Knows exceptions and Dagster's
events; not who interrupts.
"""

import asyncio
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, Final

from dagster import DagsterEvent, RetryRequested
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.execution.plan import execute_plan
from dagster._core.execution.plan.objects import ErrorSource, StepFailureData
from dagster._core.executor import multiprocess
from dagster._core.executor.child_process_executor import ChildProcessCrashException
from dagster._utils.error import USER_FACING_ERROR_ID_ATTR_NAME
from dagster_shared.error import SerializableErrorInfo

__all__ = ["interrupt_info", "tell_crashes", "tell_interrupts"]

_FAILURE: Final = "step_failure_event_from_exc_info"
_INFO: Final = "serializable_error_info_from_exc_info"
_EXPLANATION: Final = "get_run_crash_explanation"
_INTERRUPTS: Final = (DagsterExecutionInterruptedError, KeyboardInterrupt, asyncio.CancelledError)
_PACKAGES: Final = ("dagster", "dagster_shared", "dagster_pipes", "dagster_taskiq")
_EXAMPLES: Final = str(Path(__file__).parents[1] / "examples")
"""Ours, but read like a user's."""
_INSTALLED: Final = ("site-packages", "dist-packages")
_MOST_CAUSES: Final = 5


def tell_interrupts(what_happened: Callable[[Any], str]) -> None:
    """From now on, in this process, the failure of a step that was interrupted begins with what that says.

    It is called with the instance.
    """
    failure, info = _original(execute_plan, _FAILURE), _original(execute_plan, _INFO)

    @wraps(failure)
    def told_failure(
        step_context: Any, exc_info: Any, user_failure_data: Any = None, error_source: ErrorSource | None = None
    ) -> DagsterEvent:
        if error_source is not ErrorSource.INTERRUPT:
            return failure(step_context, exc_info, user_failure_data, error_source)  # type: ignore[no-any-return]
        what = what_happened(step_context.instance)
        error = interrupt_info(exc_info[1], what)
        data = StepFailureData(error, user_failure_data, error_source)  # type: ignore[no-untyped-call]
        message = f'Execution of step "{step_context.step.key}" was {what}'
        return DagsterEvent.step_failure_event(step_context, data, message)

    @wraps(info)
    def told_info(exc_info: Any, *args: Any, **kwargs: Any) -> SerializableErrorInfo:
        """Also of the request for another attempt that Dagster makes of an interrupt, for an op with a RetryPolicy."""
        cause = exc_info[1].__cause__
        if not isinstance(exc_info[1], RetryRequested) or not isinstance(cause, _INTERRUPTS):
            return info(exc_info, *args, **kwargs)  # type: ignore[no-any-return]
        error = interrupt_info(cause, what_happened(None))
        return SerializableErrorInfo("interrupted; the op has a RetryPolicy\n", [], type(exc_info[1]).__name__, error)

    setattr(execute_plan, _FAILURE, told_failure)
    setattr(execute_plan, _INFO, told_info)


def tell_crashes(why: Callable[[int], str | None]) -> None:
    """From now on, in the process of a run, the failure of a step whose process has died is what that says of its pid.

    That is for steps of the multiprocess executor. None: what Dagster says.
    """
    info, explanation = _original(multiprocess, _INFO), _original(multiprocess, _EXPLANATION)
    told: str | None = None

    @wraps(info)
    def told_info(exc_info: Any, *args: Any, **kwargs: Any) -> SerializableErrorInfo:
        nonlocal told
        crash = exc_info[1]
        told = why(crash.pid) if isinstance(crash, ChildProcessCrashException) else None
        if told is None:
            return info(exc_info, *args, **kwargs)  # type: ignore[no-any-return]
        return SerializableErrorInfo(f"{told}\n", [], type(crash).__name__)

    @wraps(explanation)
    def told_explanation(prefix: str, exit_code: int) -> str:
        return f"{prefix} is gone: {told}" if told is not None else str(explanation(prefix=prefix, exit_code=exit_code))

    setattr(multiprocess, _INFO, told_info)
    setattr(multiprocess, _EXPLANATION, told_explanation)


def interrupt_info(interrupt: BaseException, what: str) -> SerializableErrorInfo:
    """The error of a step that `interrupt` has ended. `what` is its first line."""
    name = type(interrupt).__name__
    if getattr(interrupt, USER_FACING_ERROR_ID_ATTR_NAME, None) is not None:
        return SerializableErrorInfo(f"{what}\n", [], name)  # Dagster is set to keep frames and messages from the log
    thrown = next((one for one in _interrupts_of(interrupt) if _frames_of_user(one)), interrupt)
    about = next((one for one in _around(thrown) if not isinstance(one, _INTERRUPTS)), None)
    caused = about is not None and about is thrown.__cause__
    told = _told(about, _MOST_CAUSES) if about is not None else None
    return SerializableErrorInfo(
        message=f"{what}\n",
        stack=_frames_of_user(thrown),
        cls_name=name,
        cause=told if caused else None,
        context=None if caused else told,
    )


def _interrupts_of(interrupt: BaseException) -> Iterator[BaseException]:
    """Itself, and those that it was made of: an interrupted coroutine is left by another exception than its op."""
    one: BaseException | None = interrupt
    for _ in range(_MOST_CAUSES):
        if one is None or not isinstance(one, _INTERRUPTS):
            return
        yield one
        one = one.__cause__ or one.__context__


def _around(error: BaseException) -> Iterator[BaseException]:
    """What has caused it, or was being handled when it came; and so on."""
    for _ in range(_MOST_CAUSES):
        around = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if around is None:
            return
        yield around
        error = around


def _told(error: BaseException, most: int) -> SerializableErrorInfo:
    """As Dagster would tell it, with the user's own frames."""
    cause, context = error.__cause__, None if error.__suppress_context__ else error.__context__
    return SerializableErrorInfo(
        message="".join(traceback.format_exception_only(error)),
        stack=_frames_of_user(error),
        cls_name=type(error).__name__,
        cause=_told(cause, most - 1) if cause is not None and most else None,
        context=_told(context, most - 1) if context is not None and cause is None and most else None,
    )


def _frames_of_user(error: BaseException) -> list[str]:
    """From the first frame that is neither Dagster's nor Python's to the last one; none of Dagster's, none of ours."""
    theirs = tuple(f"{Path(file).parent}/" for name in _PACKAGES if (file := _file_of(name)) is not None)
    frames = [
        frame
        for frame in traceback.TracebackException.from_exception(error).stack
        if frame.filename.startswith(_EXAMPLES) or not frame.filename.startswith(theirs)
    ]
    while frames and _is_of_python(frames[0].filename):
        del frames[0]
    return traceback.StackSummary.from_list(frames).format()


def _file_of(package: str) -> str | None:
    return getattr(sys.modules.get(package), "__file__", None)


def _is_of_python(filename: str) -> bool:
    own = filename.startswith((sysconfig.get_path("stdlib"), "<frozen "))
    return own and not any(place in filename for place in _INSTALLED)


def _original(module: Any, name: str) -> Callable[..., Any]:
    """As Dagster has it: told by one process of ours, not also by an earlier one of its tests."""
    found: Callable[..., Any] = getattr(module, name)
    original: Callable[..., Any] = getattr(found, "__wrapped__", found)
    return original
