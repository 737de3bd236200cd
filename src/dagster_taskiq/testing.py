"""For tests of ops and tasks that use `cancellation_token()`: a token that the test controls."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dagster_taskiq.cancellation.current import token_of_test
from dagster_taskiq.cancellation.model import CancelKind, Cancellation
from dagster_taskiq.cancellation.signal import CancelSignal
from dagster_taskiq.cancellation.state import State
from dagster_taskiq.cancellation.token import CancellationToken


class FakeToken(CancellationToken):
    """A `CancellationToken` that the test cancels. `checks`: how often the code has asked."""

    __slots__ = ("_cancel_after", "_fake", "checks")

    def __init__(self, cancel_after: int | None, state: Mapping[str, Any]) -> None:
        """Made by `fake_token`."""
        fake = _Fake(State(), CancelSignal())
        if state:
            fake.kept.update(state)
        super().__init__(fake.signal, fake)
        self._fake = fake
        self._cancel_after = cancel_after
        self.checks = 0

    def cancel(
        self,
        reason: str | None = None,
        *,
        requested_by: str | None = None,
        kind: CancelKind = CancelKind.REQUESTED,
        kill_at: float | None = None,
    ) -> None:
        """From now on the work is cancelled; callbacks are called in this thread. `kill_at`: as `time.time()`."""
        self._fake.signal.set(Cancellation(kind, reason, requested_by, deadline=kill_at))

    @property
    def is_cancelled(self) -> bool:
        """See `CancellationToken`."""
        self._look()
        return super().is_cancelled

    def raise_if_cancelled(self) -> None:
        """See `CancellationToken`."""
        self._look()
        super().raise_if_cancelled()

    def _look(self) -> None:
        self.checks += 1
        if self._cancel_after is not None and self.checks > self._cancel_after and not self._fake.signal.is_set:
            self.cancel()


class _Fake:
    def __init__(self, kept: State, signal: CancelSignal) -> None:
        self.kept = kept
        self.signal = signal

    def error(self, cancellation: Cancellation) -> BaseException:
        from dagster_taskiq.child.op_token import interrupt_of_op

        return interrupt_of_op(cancellation)

    def shields_ended(self, *, abandoned: bool) -> None:
        if self.signal.cancellation is not None and self.signal.came_while_shielded and not abandoned:
            raise self.error(self.signal.cancellation)

    def state(self) -> State:
        return self.kept


@contextmanager
def fake_token(*, cancel_after: int | None = None, state: Mapping[str, Any] | None = None) -> Iterator[FakeToken]:
    """As long as this lasts, `cancellation_token()` returns this token, in every thread.

    .. code-block:: python

        with fake_token(cancel_after=2) as token, pytest.raises(OpCancelled):
            upload(build_op_context())  # is cancelled when it checks for the third time
        assert token.state["upload_id"]

    `state`: the state of an earlier attempt. It is not stored anywhere.
    """
    token = FakeToken(cancel_after, state or {})
    with token_of_test(token):
        yield token
