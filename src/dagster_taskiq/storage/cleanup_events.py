"""The wording of the engine events about cleanup handlers. Knows no storage."""

from collections.abc import Sequence

from dagster_taskiq._text import duration
from dagster_taskiq.storage.engine_events import (
    ATTEMPT_KEY,
    FAILED_KEY,
    HANDLER_KEY,
    IDENTITY_KEY,
    TOOK_KEY,
    WORKER_KEY,
    EngineEvent,
    Stage,
    listed,
)


def cleanup_handlers(names: Sequence[str]) -> EngineEvent:
    """What has to be done if the run is cancelled."""
    return EngineEvent(Stage.CLEANUP_HANDLERS, f"cleanup handlers, should the run be cancelled: {listed(names)}")


def cleanup_began(worker_id: str, names: Sequence[str]) -> EngineEvent:
    """The work has stopped; the handlers of what was cut short are running."""
    return EngineEvent(
        Stage.CLEANUP_BEGAN, f"cleaning up on worker {worker_id}: {listed(names)}", {WORKER_KEY: worker_id}
    )


def cleanup(
    handler: str, identity: str, attempt: int, seconds: float, error: str | None, then: str = ""
) -> EngineEvent:
    """One attempt of one handler. `identity`: see `Handler`. `then`: what happens next when it has failed."""
    facts: dict[str, str | int | float] = {
        HANDLER_KEY: handler,
        IDENTITY_KEY: identity,
        ATTEMPT_KEY: attempt,
        TOOK_KEY: seconds,
    }
    how = f"(attempt {attempt}, {duration(seconds)}{f'; {then}' if then else ''})"
    if error is None:
        return EngineEvent(Stage.CLEANUP, f'cleanup "{handler}" succeeded {how}', facts)
    return EngineEvent(
        Stage.CLEANUP, f'cleanup "{handler}" failed {how}: {error}', facts | {FAILED_KEY: error}, error=error
    )


def cleanup_ended(reasons: Sequence[str]) -> EngineEvent:
    """All handlers have ended. `reasons`: one for each that failed."""
    if not reasons:
        return EngineEvent(Stage.CLEANUP_ENDED, "cleanup finished")
    facts = {FAILED_KEY: "\n".join(reasons)}
    return EngineEvent(Stage.CLEANUP_ENDED, cleanup_failed(reasons), facts, error=cleanup_failed(reasons))


def cleanup_failed(reasons: Sequence[str]) -> str:
    """Why the run is FAILURE and not CANCELED."""
    return f"cleanup failed: {'; '.join(reasons)}"
