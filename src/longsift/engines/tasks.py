"""What a cluster's tasks do, whichever engine starts them: each scores its share of the windows files of a run folder.

A task has a local engine of its own, records every shard that is done, and sets those aside that fail twice. The run
folder and the calculator must be seen under the same paths by all nodes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longsift.engines.local import Facts, LocalEngine, Shard, devices
from longsift.errors import UsageError
from longsift.jobs import at_work
from longsift.options import EngineOptions, ModelOptions, ScoreOptions
from longsift.shards import RunFolder, write_json
from longsift.tables import publish

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise UsageError("--engine slurm and ray need datatrove: pip install 'longsift[datatrove]'") from error

_MOST_TASKS = 64


class ScoreShards(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Score a task's share of the windows files of a run folder; takes and gives no documents.

    Args:
        out: the run folder.
        shards: a file with a line for each file that is to be scored, its name.
        model, options: what the scorer is made of.
        notes: a folder in which a task notes, under its rank, what `TaskNotes` reads; without it, it does not.
        around: gives a context in which a task works.
    """

    type = "SCORER"
    name = "longsift shards"

    def __init__(
        self,
        out: Path,
        shards: Path,
        model: ModelOptions,
        options: ScoreOptions,
        notes: Path | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__()
        self.out, self.shards, self.model, self.options = str(out), str(shards), model, options
        self.notes, self.around = None if notes is None else str(notes), around

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Score every `world_size`-th file, from the `rank`-th on, but none that is recorded as scored."""
        folder = RunFolder(self.out)
        names = Path(self.shards).read_text("utf-8").splitlines()[rank::world_size]
        windows, records = folder.windows, folder.path / "shards" / "scores"
        mine = [windows / name for name in names if not (records / name).with_suffix(".json").exists()]
        task = f"{Path(self.shards).parent.name}-{rank}"
        with self.around():
            if self.notes is None:
                if mine:
                    self._score(mine, folder, task)
            else:
                notes = TaskNotes(Path(self.notes))
                try:
                    notes.tell_facts(rank, self._score(mine, folder, task))
                except Exception as error:
                    notes.tell_error(rank, error)
                    raise
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


class TaskNotes:
    """What tasks tell whoever waits for them, in a folder that all see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def tell_facts(self, rank: int, facts: Facts) -> None:
        """Of a task that has done all that it had."""
        write_json(self._folder / f"{rank}.json", asdict(facts))

    def tell_error(self, rank: int, error: Exception) -> None:
        """Of a task that has failed."""
        write_json(self._folder / f"{rank}.error.json", f"{type(error).__name__}: {error}")

    def facts(self) -> Facts | None:
        """The calculator as the tasks have loaded it, all of them the same."""
        for path in sorted(self._folder.glob("[0-9]*.json")):
            if not path.name.endswith(".error.json"):
                return Facts(**json.loads(path.read_text("utf-8")))
        return None

    def errors(self) -> list[str]:
        """What tasks have failed with."""
        return [json.loads(path.read_text("utf-8")) for path in sorted(self._folder.glob("*.error.json"))]


def deal(names: Sequence[str], engine: EngineOptions, logs: Path) -> tuple[Path, int]:
    """Write the list of the files to score into the folder of the logs; returns it, and the number of tasks.

    There is a task even where no file is left: it tells what the calculator is, or another job depends on it.
    """
    shards = logs / "shards.txt"
    with publish(shards) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), "utf-8")
    return shards, max(1, min(engine.tasks or _MOST_TASKS, len(names)))


def new_logs(out: Path) -> Path:
    """The folder for the logs of what is begun now."""
    return out / "jobs" / time.strftime("%Y%m%dT%H%M%S")
