"""A full-text index of the Python source files installed on this machine. Plain Dagster: knows nothing of queues.

`index_sources` is a well-behaved job: one transaction, rolled back in `finally` when it is interrupted.
`stubborn_index` ignores its interrupt, and so does the process that it starts: both have to be killed.
`count_sources` is short and just succeeds.
"""

import ast
import sqlite3
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from time import monotonic

import dagster as dg


class FindConfig(dg.Config):
    """Which files."""

    limit: int | None = None
    """At most so many files; all of them by default."""
    roots: list[str] | None = None
    """Folders to look in; by default where this Python keeps its own and its installed modules."""


class IndexConfig(dg.Config):
    """Where the index is kept."""

    database: str | None = None
    """The SQLite file; by default a file of the run's own in the storage of the Dagster instance."""
    report_every: int = 200
    """A line in the run's log for every so many files."""


class SearchConfig(dg.Config):
    """What is looked for when the index stands."""

    query: str = "cancel OR cancelled"


class StubbornConfig(dg.Config):
    """How long the stubborn job goes on when nobody kills it."""

    seconds: float = 3600


def sources(config: FindConfig) -> Iterator[Path]:
    """Every Python source file under the roots, each once, in a stable order."""
    roots = config.roots or [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    seen: set[Path] = set()
    for root in roots:
        for path in sorted(Path(root).rglob("*.py")):
            if path not in seen:
                seen.add(path)
                yield path


def symbols(text: str) -> str:
    """The names of the functions and classes that a source file defines; none when it cannot be parsed."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""  # test suites are full of files that are broken on purpose
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return " ".join(node.name for node in ast.walk(tree) if isinstance(node, named))


def rows(paths: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """One row of the index for each file."""
    for path in paths:
        text = Path(path).read_text("utf-8", "replace")
        yield path, symbols(text), text


@dg.op
def find_sources(context: dg.OpExecutionContext, config: FindConfig) -> list[str]:
    """List the files to index."""
    paths = [str(path) for path in islice(sources(config), config.limit)]
    context.log.info(f"found {len(paths)} Python source files")
    return paths


@dg.op
def index_text(context: dg.OpExecutionContext, config: IndexConfig, paths: list[str]) -> str:
    """Index names and text of all files in one transaction: all of it, or nothing."""
    database = Path(config.database or Path(context.instance.storage_directory()) / context.run_id / "index.sqlite")
    database.parent.mkdir(parents=True, exist_ok=True)
    indexed = 0
    connection = sqlite3.connect(database, isolation_level=None)
    try:
        connection.execute("CREATE VIRTUAL TABLE IF NOT EXISTS source USING fts5(path UNINDEXED, symbols, text)")
        connection.execute("BEGIN IMMEDIATE")
        for row in rows(paths):
            connection.execute("INSERT INTO source VALUES (?, ?, ?)", row)
            indexed += 1
            if indexed % config.report_every == 0:
                context.log.info(f"indexed {indexed} of {len(paths)} files")
        connection.execute("COMMIT")
    finally:
        # Runs on every way out, an interrupt included: nobody finds half an index, and the lock is given back.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
            context.log.info(f"finally: rolled back {indexed} files")
        connection.close()
        context.log.info("finally: database closed")
    return str(database)


@dg.op
def verify_search(context: dg.OpExecutionContext, config: SearchConfig, database: str) -> int:
    """Optimise the index and prove that it answers."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("INSERT INTO source (source) VALUES ('optimize')")
        connection.commit()
        started = monotonic()
        (found,) = connection.execute("SELECT count(*) FROM source WHERE source MATCH ?", (config.query,)).fetchone()
        context.log.info(f"{found} files match {config.query!r}, found in {(monotonic() - started) * 1000:.1f} ms")
        best = connection.execute("SELECT path FROM source WHERE source MATCH ? ORDER BY rank LIMIT 5", (config.query,))
        context.log.info("the best: " + ", ".join(Path(path).name for (path,) in best))
    return int(found)


@dg.job(executor_def=dg.in_process_executor)
def index_sources() -> None:
    """Index all installed Python source files; terminate it in the middle and nothing is left of it."""
    verify_search(index_text(find_sources()))


IGNORES_SIGTERM = """
import pathlib, signal, sys, time, zlib
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    for path in sys.argv[2:]:
        zlib.compress(pathlib.Path(path).read_bytes(), 9)
"""


@dg.op
def index_stubbornly(context: dg.OpExecutionContext, config: StubbornConfig) -> None:
    """Go on whatever happens: the kind of code that only a kill ends."""
    paths = [str(path) for path in islice(sources(FindConfig()), 200)]
    command = [sys.executable, "-c", IGNORES_SIGTERM, str(config.seconds), *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as helper:  # noqa: S603 - our own interpreter and script
        if helper.stdout is not None:
            helper.stdout.readline()
        end = monotonic() + config.seconds
        announced = False
        while monotonic() < end:
            try:
                if not announced:
                    context.log.info(f"indexing stubbornly, with pid {helper.pid} to help")
                    announced = True
                for _ in rows(paths):
                    if monotonic() >= end:
                        break
            except BaseException as error:  # noqa: BLE001 - the bad habit that this job is there to show
                context.log.warning(f"ignored: {type(error).__name__}")


@dg.job(executor_def=dg.in_process_executor)
def stubborn_index() -> None:
    """Ignores its interrupt, and so does its subprocess; ends only when it is killed."""
    index_stubbornly()


@dg.op
def count_lines(context: dg.OpExecutionContext, paths: list[str]) -> int:
    """Count the lines of all files."""
    lines = sum(Path(path).read_bytes().count(b"\n") for path in paths)
    context.log.info(f"{lines} lines in {len(paths)} files")
    return lines


@dg.job(
    executor_def=dg.in_process_executor,
    config=dg.RunConfig(ops={"find_sources": FindConfig(limit=500)}),
)
def count_sources() -> None:
    """Count the lines of 500 source files; short, and just succeeds."""
    count_lines(find_sources())


defs = dg.Definitions(jobs=[index_sources, stubborn_index, count_sources])
