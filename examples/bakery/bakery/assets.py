"""Ingest, transform, report: three assets, with a partition for each day of January 2025."""

import csv
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import dagster as dg

from dagster_taskiq import CleanupContext, cancellation_token, on_cancel

from .files import Files
from .tills import PAGES, RECEIPTS_PER_PAGE, Receipt, pages

DAYS = dg.DailyPartitionsDefinition(start_date="2025-01-01", end_date="2025-02-01")


class Receiving(dg.Config):
    """How slow the tills are."""

    seconds: float = 10
    """Until a whole day has been handed over."""


class Entering(dg.Config):
    """How slow the books are."""

    seconds: float = 5
    """Until a whole day has been entered."""


def remove_half_a_file(context: CleanupContext) -> None:
    """May be called twice, and when nothing was begun: what is not there is no error."""
    if "file" in context.state:
        Path(context.state["file"]).unlink(missing_ok=True)
        context.log.info("removed %s", context.state["file"])


@dg.asset(partitions_def=DAYS, group_name="bakery", kinds={"csv"})
@on_cancel(remove_half_a_file)
def receipts(context: dg.AssetExecutionContext, config: Receiving, files: Files) -> None:
    """One day's receipts of all shops: the whole file, or none."""
    file = files.receipts(context.partition_key)
    part = file.with_suffix(f".{context.run.run_id[:8]}.part")
    # Noted before it is begun: the handler finds it also when this process is killed, or dies with its worker.
    cancellation_token().state["file"] = str(part)
    with part.open("w", newline="") as out:
        for number, page in enumerate(pages(context.partition_key, config.seconds), 1):
            csv.writer(out).writerows(page)
            out.flush()
            if number % (PAGES // 10) == 0:
                context.log.info("received %d of %d pages", number, PAGES)
    part.replace(file)


def read(file: Path) -> list[Receipt]:
    """The receipts in a file; none when there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="") as rows:
        return [(shop, article, int(count), int(cents)) for shop, article, count, cents in csv.reader(rows)]


@dg.asset(partitions_def=DAYS, group_name="bakery", kinds={"sqlite"}, deps=[receipts])
def sales(context: dg.AssetExecutionContext, config: Entering, files: Files) -> None:
    """One day in the books, entered in one transaction. Entering it again replaces it."""
    day = context.partition_key
    found = read(files.receipts(day)) + read(files.inbox() / f"{day}.csv")
    books = sqlite3.connect(files.books(day), isolation_level=None)
    entered = 0
    try:
        books.execute("CREATE TABLE IF NOT EXISTS sale (shop TEXT, article TEXT, number INTEGER, cents INTEGER)")
        books.execute("BEGIN IMMEDIATE")
        books.execute("DELETE FROM sale")
        for entered, receipt in enumerate(found, 1):
            books.execute("INSERT INTO sale VALUES (?, ?, ?, ?)", receipt)
            if entered % RECEIPTS_PER_PAGE == 0:
                time.sleep(config.seconds / PAGES)
            if entered % (RECEIPTS_PER_PAGE * PAGES // 10) == 0:
                context.log.info("entered %d of %d receipts", entered, len(found))
        books.execute("COMMIT")
    finally:
        # On every way out, an interrupt included: nobody finds half a day, and the lock is given back.
        if books.in_transaction:
            books.execute("ROLLBACK")
            context.log.info("finally: rolled back %d receipts", entered)
        books.close()
        context.log.info("finally: database closed")


def takings(books: Path) -> list[tuple[str, int, int]]:
    """Shop, receipts and cents, for each shop of a day."""
    with closing(sqlite3.connect(books)) as opened:
        return list(opened.execute("SELECT shop, count(*), sum(cents) FROM sale GROUP BY shop ORDER BY shop"))


@dg.asset(partitions_def=DAYS, group_name="bakery", kinds={"markdown"}, deps=[sales])
def report(context: dg.AssetExecutionContext, files: Files) -> dg.MaterializeResult[None]:
    """What each shop has taken on one day."""
    day = context.partition_key
    shops = takings(files.books(day))
    lines = [f"# {day}", "", "| shop | receipts | takings |", "| --- | ---: | ---: |"]
    lines += [f"| {shop} | {number} | {cents / 100:,.2f} |" for shop, number, cents in shops]
    text = "\n".join(lines) + "\n"
    files.report(day).write_text(text)
    total = sum(cents for _, _, cents in shops) / 100
    return dg.MaterializeResult(metadata={"takings": total, "report": dg.MetadataValue.md(text)})
