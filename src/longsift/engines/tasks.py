"""What a cluster's tasks do, whichever engine starts them: each cuts its share of the pieces of files into windows, or
scores its share of the windows files of a run folder.

A task that scores has a local engine of its own, records every shard that is done, and sets those aside that fail
twice. The run folder, the documents and the calculator must be seen under the same paths by all nodes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from longsift.documents import count_lines
from longsift.engines.local import Facts, LocalEngine, Shard, devices
from longsift.engines.pieces import cut_pieces
from longsift.errors import InputError, UsageError
from longsift.jobs import at_work, noted
from longsift.options import EngineOptions, ModelOptions, ScoreOptions, WindowOptions
from longsift.progress import Progress
from longsift.shards import RunFolder
from longsift.tables import parquet_files, publish

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise UsageError("--engine slurm and ray need datatrove: pip install 'longsift[datatrove]'") from error

log = logging.getLogger(__name__)

_MOST_TASKS = 64


class CountLines(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Count the lines that begin in a task's share of the pieces of files, which tell the numbers of the rows after.

    Files that cannot be read are left to those who cut them.

    Args:
        out: the run folder, whose windows stage is begun.
        pieces: a file with a line for each piece, its shard.
        logs: a folder in which a task notes, under its rank, what `TaskNotes` reads.
        around: gives a context in which a task works.
    """

    type = "COUNTER"
    name = "longsift lines"

    def __init__(
        self, out: Path, pieces: Path, logs: Path, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        super().__init__()
        self.out, self.pieces, self.logs, self.around = str(out), str(pieces), str(logs), around

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do it for every `world_size`-th piece, from the `rank`-th on."""
        folder = RunFolder(self.out)
        with self.around(), noted(self.logs, rank), at_work(folder.path, _sign(self.logs, rank), list):
            planned = folder.pieces()
            for shard in _share(self.pieces, rank, world_size):
                try:
                    folder.note_lines(shard, count_lines(planned[shard]))
                except InputError as error:
                    log.warning("%s", error)
        yield from ()


class CutPieces(PipelineStep):  # type: ignore[misc]
    """Cut a task's share of the pieces of files into windows; those that cannot be read are left, and told of in a log.

    Args:
        out, pieces, logs, around: as in `CountLines`.
        model, options: as the stage was begun with.
    """

    type = "CUTTER"
    name = "longsift windows"

    def __init__(
        self,
        out: Path,
        pieces: Path,
        logs: Path,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        model: ModelOptions,
        options: WindowOptions,
    ) -> None:
        super().__init__()
        self.out, self.pieces, self.model, self.options = str(out), str(pieces), model, options
        self.logs, self.around = str(logs), around

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Cut every `world_size`-th piece, from the `rank`-th on, but none that is recorded as cut."""
        folder = RunFolder(self.out)
        with self.around(), noted(self.logs, rank):
            planned, records = folder.pieces(), folder.path / "shards" / "windows"
            share = _share(self.pieces, rank, world_size)
            mine = {shard: planned[shard] for shard in share if not (records / f"{shard}.json").exists()}
            under_way: list[str] = []
            size = sum(piece.size for piece in mine.values())
            with (
                at_work(folder.path, _sign(self.logs, rank), lambda: under_way[-1:]),
                Progress("windows", size, "bytes") as progress,
            ):
                unread = cut_pieces(mine, folder, self.model, self.options, progress, on_begin=under_way.append)
            for why in unread:
                log.warning("%s", why)
        yield from ()


class ScoreShards(PipelineStep):  # type: ignore[misc]
    """Score a task's share of the windows files of a run folder; takes and gives no documents.

    Args:
        out: the run folder.
        shards: a file with a line for each file that is to be scored, its name; all that are there, if it is None.
        logs, around: as in `CountLines`.
        model, options: what the scorer is made of.
    """

    type = "SCORER"
    name = "longsift shards"

    def __init__(
        self,
        out: Path,
        shards: Path | None,
        logs: Path,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        model: ModelOptions,
        options: ScoreOptions,
    ) -> None:
        super().__init__()
        self.out, self.model, self.options = str(out), model, options
        self.logs, self.around, self.shards = str(logs), around, None if shards is None else str(shards)

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Score every `world_size`-th file, from the `rank`-th on, but none that is recorded as scored."""
        folder = RunFolder(self.out)
        with self.around(), noted(self.logs, rank) as told:
            windows, records = folder.windows, folder.path / "shards" / "scores"
            if self.shards is None:
                names = [path.name for path in parquet_files(windows)][rank::world_size]
            else:
                names = _share(self.shards, rank, world_size)
            mine = [windows / name for name in names if not (records / name).with_suffix(".json").exists()]
            if mine or rank == 0:  # which tells what the calculator is, even where nothing is left
                told |= asdict(self._score(mine, folder, _sign(self.logs, rank)))
        yield from ()

    def _score(self, windows: list[Path], folder: RunFolder, task: str) -> Facts:
        clock, chosen = time.monotonic(), devices(self.options)

        def record(shard: Shard) -> None:
            nonlocal clock
            before, clock = clock, time.monotonic()
            folder.record("scores", shard.name, shard.record(clock - before, len(set(chosen))))
            self.stat_update("windows", value=shard.counts["windows"], unit="shard")
            self.stat_update("tokens", value=shard.counts["tokens"], unit="shard")

        with LocalEngine(
            folder.scores,
            self.model,
            self.options,
            chosen,
            on_ready=lambda: None,
            on_done=record,
            on_set_aside=lambda path, why: folder.set_aside(path.stem, why),
            on_advance=lambda *counted: None,
        ) as engine:
            for path in windows:
                engine.submit(path)
            with at_work(folder.path, task, engine.under_way):
                return engine.finish()


def _sign(logs: str, rank: int) -> str:
    """The name under which a task gives its sign of life."""
    return f"{Path(logs).parent.name}-{Path(logs).name}-{rank}"


def _share(names: str, rank: int, world_size: int) -> list[str]:
    return Path(names).read_text("utf-8").splitlines()[rank::world_size]


def deal(names: Sequence[str], engine: EngineOptions, logs: Path) -> tuple[Path, int]:
    """Write the list of what is to be done into the folder of the logs; returns it, and the number of tasks.

    There is a task even where nothing is left: it tells what the calculator is, or another job depends on it.
    """
    listed = logs / "names.txt"
    with publish(listed) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), "utf-8")
    return listed, max(1, min(tasks_at_most(engine), len(names)))


def tasks_at_most(engine: EngineOptions) -> int:
    """Of an array, whatever there is to do."""
    return engine.tasks or _MOST_TASKS


def for_tasks(options: WindowOptions, engine: EngineOptions) -> WindowOptions:
    """The options of cutting in a task, which has a process for every core that it has."""
    return replace(options, cut_workers=options.cut_workers or engine.cpus)


def new_logs(out: Path) -> Path:
    """The folder for the logs of what is begun now."""
    return out / "jobs" / time.strftime("%Y%m%dT%H%M%S")
