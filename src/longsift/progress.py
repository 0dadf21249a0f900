"""Progress of a stage on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

_PLAIN_LINE_EVERY = 10.0  # seconds


class Progress:
    """Counts work done towards a total, and says so with rate and time left.

    Args:
        stage: what is going on, "windows" or "scores".
        total: amount of work in `unit`, with what an earlier run had done.
        unit: "tokens" or "bytes", which the rate and the time left are reckoned in.
        done: amount that an earlier run had done.
        quiet: count, but say nothing.
    """

    def __init__(self, stage: str, total: int, unit: str, *, done: int = 0, quiet: bool = False) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self.counts: dict[str, int] = {}
        self._resumed = done
        self._quiet = quiet
        self._started = self._said = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the stage was entered."""
        return time.monotonic() - self._started

    def __enter__(self) -> Self:
        self._started = self._said = time.monotonic()
        self._bar = None
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.stage, total=max(self.total, 1), completed=self.done, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if not self._quiet and kind is None:
            print(f"{self.stage}: {self.line(left=False)}", file=sys.stderr)

    def count(self, **counts: int) -> None:
        """Add to named counts (windows, failed, …)."""
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def advance(self, amount: int, **counts: int) -> None:
        """Add `amount` of work and any named counts."""
        self.done += amount
        self.count(**counts)
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.line())
        elif time.monotonic() - self._said >= _PLAIN_LINE_EVERY:
            self._said = time.monotonic()
            print(f"{self.stage}: {self.line()}", file=sys.stderr, flush=True)

    def line(self, *, left: bool = True) -> str:
        """The state in words, such as '31 windows · 126,976 of 163,840 tokens · 9,120 tokens/s · 0:00:04 left'."""
        parts = [f"{count:,} {name.replace('_', ' ')}" for name, count in self.counts.items()]
        parts.append(f"{self.done:,} of {self.total:,} {self.unit}")
        new = self.done - self._resumed
        if new and self.seconds > 0:
            rate = new / self.seconds
            parts.append(f"{rate:,.0f} {self.unit}/s")
            if left and self.total > self.done:
                parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        return " · ".join(parts)
