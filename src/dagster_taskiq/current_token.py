"""`cancellation_token()`: finds out what calls it. Imports Dagster only where it is in use."""

import sys

from dagster_taskiq.token import CancellationToken, never, provided


def cancellation_token() -> CancellationToken:
    """The token of the work that calls this: an op, or a taskiq task (`TaskiqDepends(cancellation_token)`, too).

    In any other place, under any other executor and in tests, a token that is never cancelled and whose state is not
    kept: the same code runs unchanged. Call it once and keep it; what it costs is in the call. For tests of what a
    cancellation does: `fake_token`.
    """
    token = provided()
    if token is None and "dagster" in sys.modules:
        # It may be an op, in a process that Dagster has started and where nothing of this package has run so far.
        from dagster_taskiq.op_token import token_of_op

        token = token_of_op()
    return token or never()
