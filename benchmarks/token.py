"""What does it cost an op to look at its token? Nanoseconds per call, beside what Python takes for nothing.

    make benchmark-token            # or: python -m benchmarks.token

The token is that of an op in a child of a worker: with a channel to the worker, and a thread that listens.
"""

import socket
import sys
import timeit

from rich.console import Console
from rich.table import Table

from dagster_taskiq import CancellationToken, cancellation_token
from dagster_taskiq.child.child_process import ChildProcess
from dagster_taskiq.child.control_channel import ControlChannel

CALLS = 200_000
ROUNDS = 15


def nanoseconds(statement: str, token: CancellationToken) -> float:
    """Per call, the best of some rounds: the others were disturbed."""
    names = {"token": token, "cancellation_token": cancellation_token, "nothing": lambda: None}
    return min(timeit.repeat(statement, globals=names, number=CALLS, repeat=ROUNDS)) / CALLS * 1e9


def main() -> None:
    """Measure and print."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        token = ChildProcess(ControlChannel(theirs)).token()
        table = Table("call", "ns", title=f"Python {sys.version.split()[0]}: best of {ROUNDS} times {CALLS:,}")
        for statement in (
            "nothing()",
            "token.is_cancelled",
            "token.raise_if_cancelled()",
            "cancellation_token()",
            "with token.shield('x'): pass",
        ):
            table.add_row(statement, f"{nanoseconds(statement, token):,.0f}")
        Console().print(table)


if __name__ == "__main__":
    main()
