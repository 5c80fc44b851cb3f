"""Progress of a run: silent (`Progress`), or a live table and a progress bar (`LiveProgress`)."""

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
from tokbench.results.cell import Cell, Setting
from tokbench.results.folder import RECORDS, RunFolder
from tokbench.results.records import FailureRecord, Record

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_FRAME_SECONDS = 0.5
# Without a terminal, for example in CI: how often a long phase prints a line.
_LINE_SECONDS = 30.0


class Progress:
    """Silent except for warnings, which go through Python's `warnings`. Subclasses display the events."""

    def started(self, folder: RunFolder, cells: int, measurements: int) -> None:
        """The run folder exists; the run has this many cells and measurements in total."""

    def continued(self, records: list[Record]) -> None:
        """The folder holds these records of earlier sessions, which are not measured again."""

    def phase(self, name: str, total: int | None) -> None:
        """A new phase begins, of `total` steps, or None if unknown."""

    def advance(self, done: int) -> None:
        """`done` steps of the phase are finished."""

    def recorded(self, record: Record) -> None:
        """This record was just written."""

    def warn(self, text: str) -> None:
        """Something may make the results unreliable."""
        warnings.warn(text, stacklevel=2)

    def note(self, text: str) -> None:
        """Something worth knowing that is no fault."""

    def finished(self, cells: list[Cell], plots: list[Path]) -> None:
        """The run is over; these are its cells, and `plots` are the files drawn."""


class LiveProgress(Progress):
    """A progress bar with the time left, above a rich table of the results so far.

    Use it as a context manager. Without a terminal it prints a line for each phase, and one every half minute in long
    phases. It draws only on events and has no thread of its own: a frame takes tens of milliseconds of Python, which
    would delay kernel launches in a pass that is being timed.
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
            TextColumn("{task.description}", markup=False),
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
        self._table: RenderableType | None = None  # of the records; None: must be rendered again
        self._drawn = 0.0

    def __enter__(self) -> LiveProgress:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def abandon(self) -> None:
        """Restore the terminal before the process ends, even in the middle of a frame or of `__exit__`."""
        with suppress(Exception):  # a half-drawn frame may raise anything
            self._live.stop()
        sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
        sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        # A new console: the current one may hold the lock of its unfinished frame.
        console = type(self._console)(file=self._console.file, force_terminal=self._console.is_terminal)
        with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: during another print
            console.show_cursor()

    def started(self, folder: RunFolder, cells: int, measurements: int) -> None:
        self.folder, self._measurements = folder, measurements
        self._say(f"{cells} cells → {folder.path}")

    def continued(self, records: list[Record]) -> None:
        self._records = list(records)
        self._say(f"Continuing: {self._count()} already done")

    def phase(self, name: str, total: int | None) -> None:
        self._draw()  # the last phase's full bar and its records
        self._bars.remove_task(self._task)
        self._task = self._bars.add_task(printable(name), total=total)
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

    def note(self, text: str) -> None:
        self._say(text)

    def finished(self, cells: list[Cell], plots: list[Path]) -> None:
        from tokbench.report.tables import print_table

        self._live.stop()
        print_table(self._console, cells)
        if self.failures and self.folder:
            self._say(f"{self.failures} failed; tracebacks: {self.folder.path / RECORDS}", style="red")
        for plot in plots:
            self._say(f"Plot: {plot}")

    def kept(self, command: str = "", earlier: Path | None = None) -> str:
        """The line for an interrupted run: what is on disk, and the command that continues it, if any.

        earlier: the folder of the run being continued, if any.
        """
        continuing = f"; continue with: {command}" if command else ""
        if self.folder is not None:
            return f"interrupted; {self._count()} are kept in {self.folder.path}{continuing}"
        if earlier is not None:
            return f"interrupted before anything was added to {earlier}; its results are kept{continuing}"
        return "interrupted before anything was measured"

    def _count(self) -> str:
        measured = {
            (record.cell, record.kind, Setting.of(record)) for record in self._records if record.kind != "failure"
        }
        return f"{len(measured)} of {self._measurements} measurements"

    def _draw_in_time(self) -> None:
        if time.monotonic() - self._drawn > _FRAME_SECONDS:
            self._draw()

    def _draw(self) -> None:
        from rich.console import Group

        if self._console.is_terminal:
            if self._records and self._table is None:
                self._table = self._render()
            # The bar on top: if the table is taller than the terminal, its end is cut off.
            shown = Group(self._bars) if self._table is None else Group(self._bars, self._table)
            self._live.update(shown, refresh=True)
            self._drawn = time.monotonic()

    def _render(self) -> RenderableType:
        from tokbench.report.tables import render_table
        from tokbench.results.table import cells_of

        table = render_table(cells_of(self._records), "rich", width=self._console.width)
        table.caption = None
        return table

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True)
