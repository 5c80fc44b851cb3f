"""What a run tells while it is going on: nothing (`Progress`), or a live table and a bar (`LiveProgress`)."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tokbench.errors import printable
from tokbench.results.cell import Cell
from tokbench.results.folder import RECORDS, RunFolder
from tokbench.results.records import FailureRecord, Record
from tokbench.results.table import cells_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_FRAME_SECONDS = 0.5
# Where there is no terminal, such as in CI, a line that often tells that it goes on.
_LINE_SECONDS = 30.0


class Progress:
    """Silent but for warnings, which go through Python's `warnings`. Subclasses show what they are told."""

    def started(self, folder: RunFolder, cells: int, measurements: int) -> None:
        """The run folder exists, and is to hold so many measurements of so many cells."""

    def continued(self, records: list[Record]) -> None:
        """The folder holds these records of earlier sessions; what they tell is not measured again."""

    def phase(self, name: str, total: int | None) -> None:
        """A new stretch of work begins, of `total` steps, None where that is not known."""

    def advance(self, done: int) -> None:
        """So many steps of the phase are done by now."""

    def recorded(self, record: Record) -> None:
        """This record was just written."""

    def warn(self, text: str) -> None:
        """Something that makes the results doubtful."""
        warnings.warn(text, stacklevel=2)

    def finished(self, cells: list[Cell], plots: list[Path]) -> None:
        """The run is over; these are its cells, and `plots` are the files drawn."""


class LiveProgress(Progress):
    """A rich table that fills while the run goes on, over a progress bar with the time left.

    Use it as a context manager. Where the output is no terminal, each phase is one line instead, and a long one a line
    every half minute.
    It draws only when it is told something, never from a thread of its own: a frame takes tens of milliseconds of
    Python, during which no kernel is launched and any pass that is being timed stands still.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.folder: RunFolder | None = None
        self.failures = 0
        self._measurements = 0
        self._console = console
        self._records: list[Record] = []
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bars.add_task("Loading", total=None)
        self._live = Live(self._bars, console=console, transient=True, auto_refresh=False)
        self._table: RenderableType | None = None  # of the records; None: to be rendered again
        self._drawn = 0.0

    def __enter__(self) -> LiveProgress:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def abandon(self) -> None:
        """Give the terminal back where the process is about to end, whatever it is amid: a frame, or `__exit__`."""
        with suppress(Exception):  # half a frame may draw as anything
            self._live.stop()
        sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
        sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        # Another console: this one may wait for the end of its frame.
        console = type(self._console)(file=self._console.file, force_terminal=self._console.is_terminal)
        with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: amid another print
            console.show_cursor()

    def started(self, folder: RunFolder, cells: int, measurements: int) -> None:
        self.folder, self._measurements = folder, measurements
        self._say(f"{cells} cells → {folder.path}")

    def continued(self, records: list[Record]) -> None:
        self._records = list(records)
        self._say(f"Continuing: {self._count()} are there")

    def phase(self, name: str, total: int | None) -> None:
        self._draw()  # the last phase's bar, full, and all that it recorded
        self._bars.remove_task(self._task)
        self._task = self._bars.add_task(name, total=total)
        self._draw()
        if not self._console.is_terminal:
            self._say(name)
            self._drawn = time.monotonic()

    def advance(self, done: int) -> None:
        self._bars.update(self._task, completed=done)
        self._draw_in_time()
        bar = self._bars.tasks[0]
        due = time.monotonic() - self._drawn > _LINE_SECONDS
        if not self._console.is_terminal and due and done != bar.total:
            self._drawn = time.monotonic()
            left = f", about {timedelta(seconds=round(bar.time_remaining))} left" if bar.time_remaining else ""
            self._say(f"{bar.description}: {done:,} of {bar.total:,.0f}{left}" if bar.total else bar.description)

    def recorded(self, record: Record) -> None:
        self._records.append(record)
        self._table = None
        if isinstance(record, FailureRecord):
            self.failures += 1
            self._say(f"failed: {record.cell}: {record.message}", style="red")
        self._draw_in_time()

    def warn(self, text: str) -> None:
        self._say(f"Warning: {text}", style="bold red")

    def finished(self, cells: list[Cell], plots: list[Path]) -> None:
        from tokbench.report.tables import print_table

        self._live.stop()
        print_table(self._console, cells)
        if self.failures and self.folder:
            self._say(f"{self.failures} failed; tracebacks: {self.folder.path / RECORDS}", style="red")
        for plot in plots:
            self._say(f"Plot: {plot}")

    def kept(self, command: str = "", earlier: Path | None = None) -> str:
        """For a run that was interrupted: what is on disk, and the command that continues it, if one does.

        earlier: the folder of a run that was to be continued, if one was.
        """
        continuing = f"; continue with: {command}" if command else ""
        if self.folder is not None:
            return f"interrupted; {self._count()} are kept in {self.folder.path}{continuing}"
        if earlier is not None:
            return f"interrupted before anything was added to {earlier}; all that is there is kept{continuing}"
        return "interrupted before anything was measured"

    def _count(self) -> str:
        measured = {(record.cell, record.kind) for record in self._records if record.kind != "failure"}
        return f"{len(measured)} of {self._measurements} measurements"

    def _draw_in_time(self) -> None:
        if time.monotonic() - self._drawn > _FRAME_SECONDS:
            self._draw()

    def _draw(self) -> None:
        from rich.console import Group

        if self._console.is_terminal:
            if self._records and self._table is None:
                self._table = self._render()
            # The bar on top: where the table is taller than the terminal, its end is what goes unseen.
            shown = Group(self._bars) if self._table is None else Group(self._bars, self._table)
            self._live.update(shown, refresh=True)
            self._drawn = time.monotonic()

    def _render(self) -> RenderableType:
        from tokbench.report.tables import render_table

        table = render_table(cells_of(self._records), "rich", width=self._console.width)
        table.caption = None
        return table

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True)
