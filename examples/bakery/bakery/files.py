"""Where what lies: all files of the bakery are in one folder, beside Dagster's own."""

from pathlib import Path

import dagster as dg
from pydantic import PrivateAttr


class Files(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The files, by day. Their folders exist."""

    folder: str | None = None
    """By default `bakery` in the folder that Dagster's own files are in: DAGSTER_HOME, if nothing else is set."""
    _root: Path = PrivateAttr()

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Find the folder of this instance."""
        if self.folder is not None:
            self._root = Path(self.folder)
        elif context.instance is not None:
            self._root = Path(context.instance.storage_directory()).parent / "bakery"

    def receipts(self, day: str) -> Path:
        """What the tills have handed over, as CSV."""
        return self._made("receipts") / f"{day}.csv"

    def books(self, day: str) -> Path:
        """A SQLite database. Each day has its own, so that no day waits for another one's transaction."""
        return self._made("books") / f"{day}.sqlite"

    def report(self, day: str) -> Path:
        """The report, as Markdown."""
        return self._made("reports") / f"{day}.md"

    def inbox(self) -> Path:
        """Where the shops drop what they forgot to type in: `2025-01-07.csv`, in the form of the receipts."""
        return self._made("inbox")

    def _made(self, name: str) -> Path:
        folder = self._root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
