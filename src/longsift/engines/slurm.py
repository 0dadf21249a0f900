"""The Slurm engine: a job array scores the windows of a run folder, through datatrove's executor.

A task scores every n-th of the windows files without scores, with a local engine of its own that records them, and sets
those aside that fail twice. The job that depends on the array tries these again, and finishes the run as the same
command would have without Slurm. The run folder and the calculator must be seen under the same paths by all nodes.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from longsift import pipeline
from longsift.engines.local import LocalEngine, Shard, devices
from longsift.errors import OutputError, UsageError
from longsift.options import EngineOptions, ModelOptions, ScoreOptions, SelectOptions
from longsift.scoring import score_identity
from longsift.scoring_stage import _check_tokenizer, model_of, windows_to_score
from longsift.shards import RunFolder, write_json
from longsift.tables import parquet_files, publish

try:
    from datatrove.executor import SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise UsageError("--engine slurm needs datatrove: pip install 'longsift[datatrove]'") from error

_MOST_TASKS = 64


class ScoreShards(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Score a task's share of the windows files of a run folder; takes and gives no documents.

    Args:
        out: the run folder.
        shards: a file with a line for each file that is to be scored, its name.
        model, options: what the scorer is made of.
    """

    type = "SCORER"
    name = "longsift shards"

    def __init__(self, out: Path, shards: Path, model: ModelOptions, options: ScoreOptions) -> None:
        super().__init__()
        self.out, self.shards, self.model, self.options = str(out), str(shards), model, options

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Score every `world_size`-th file, from the `rank`-th on, but none that this task has scored before."""
        folder = RunFolder(self.out)
        names = Path(self.shards).read_text("utf-8").splitlines()[rank::world_size]
        windows, records = folder.windows, folder.path / "shards" / "scores"
        mine = [windows / name for name in names if not (records / name).with_suffix(".json").exists()]
        if mine:
            self._score(mine, folder)
        yield from ()

    def _score(self, windows: list[Path], folder: RunFolder) -> None:
        clock = time.monotonic()

        def record(shard: Shard) -> None:
            nonlocal clock
            before, clock = clock, time.monotonic()
            folder.record("scores", shard.name, {**shard.counts, "seconds": round(clock - before, 3)})
            self.stat_update("windows", value=shard.counts["windows"], unit="shard")
            self.stat_update("tokens", value=shard.counts["tokens"], unit="shard")

        with LocalEngine(
            folder.scores,
            self.model,
            self.options,
            devices(self.options),
            on_ready=lambda: None,
            on_done=record,
            on_set_aside=lambda path, why: folder.set_aside(path.stem, why),
            on_advance=lambda *counted: None,
        ) as engine:
            for path in windows:
                engine.submit(path)
            engine.finish()


class FinishRun(PipelineStep):  # type: ignore[misc]
    """Finish a run whose shards are scored: its manifest and, where asked for, the selection and the report."""

    type = "FINISH"
    name = "longsift run"

    def __init__(
        self, out: Path, model: ModelOptions, options: ScoreOptions, selection: SelectOptions | None, max_bad: float
    ) -> None:
        super().__init__()
        self.out, self.model, self.options = str(out), model, options
        self.selection, self.max_bad = selection, max_bad

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do it; too many bad rows fail the job at its end."""
        pipeline.score(self.out, self.model, self.options, quiet=True)
        if self.selection is not None:
            pipeline.select(self.out, self.selection)
            pipeline.report(self.out)
        pipeline.check_bad(self.out, self.max_bad)
        yield from ()


def check(out: Path | str, options: ScoreOptions) -> None:
    """Find what cannot work before windows are cut.

    Raises:
        UsageError: no `sbatch` here, or options of the local engine.
        OutputError: jobs of an earlier command for the run folder `out` have not ended.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("There is no sbatch here. Run this on a machine that submits to the cluster.")
    if options.device != "auto" or options.workers is not None:
        raise UsageError("--device and --workers go with --engine local; --gpus-per-task and --tasks say it to Slurm.")
    _check_ended(Path(out) / "jobs")


def submit(
    out: Path | str,
    model: ModelOptions,
    options: ScoreOptions,
    engine: EngineOptions,
    selection: SelectOptions | None = None,
    *,
    max_bad: float,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Have Slurm score the windows of a run folder; shards that are scored already stay.

    Args:
        out: the run folder, whose windows are cut.
        selection: select and report when all is scored.
        max_bad: share of bad rows or failed windows above which the last job fails.
        overwrite: throw away scores of other parameters.

    Returns:
        The numbers of the jobs, of tasks and of shards left to score, and the folder of the logs.

    Raises:
        UsageError: `sbatch` refuses, or options cannot work.
        OutputError: no windows, scores of other parameters, or jobs of an earlier command that have not ended.
    """
    folder = RunFolder(Path(out).resolve())
    windows = windows_to_score(folder)
    model = model_of(windows, model)
    _check_tokenizer(windows, model)
    gpus = 1 if engine.gpus_per_task is None else engine.gpus_per_task
    options = replace(options, device="cuda" if gpus else "cpu")
    # What the scores depend on is the device of the tasks, which this machine need not have.
    here = score_identity(model.model or "embedded", model.revision, replace(options, device="cpu"), windows["length"])
    jobs = folder.path / "jobs"
    with folder.lock():
        _check_ended(jobs)
        finished = folder.begin("scores", here | {"device": options.device}, overwrite=overwrite)
        if finished and selection is None:
            return {"jobs": [], "tasks": 0, "shards": 0, "logs": None}
        done = folder.records("scores")
        left = [] if finished else [path for path in parquet_files(folder.windows) if path.stem not in done]
        # An array needs a task, and the last job an array to depend on, where no more is left than to select.
        tasks = max(1, min(engine.tasks or _MOST_TASKS, len(left)))
        logs = jobs / time.strftime("%Y%m%dT%H%M%S")
        shards = logs / "shards.txt"
        with publish(shards) as temporary:
            temporary.write_text("".join(f"{path.name}\n" for path in left), "utf-8")
        executor: dict[str, Any] = {
            "time": engine.time or "24:00:00",
            "partition": engine.partition,
            "cpus_per_task": engine.cpus_per_task or 4,
            "mem_per_cpu_gb": engine.mem_per_cpu or 4,
            "gpus_per_task": gpus,
            "qos": "",
            "env_command": f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            "sbatch_args": {"kill-on-invalid-dep": "yes", **engine.further()},
        }
        score = SlurmPipelineExecutor(
            [ScoreShards(folder.path, shards, model, options)],
            tasks=tasks,
            job_name="longsift-score",
            logging_dir=str(logs / "score"),
            slurm_logs_folder=str(logs / "slurm"),
            **executor,
        )
        finish = SlurmPipelineExecutor(
            [FinishRun(folder.path, model, options, selection, max_bad)],
            tasks=1,
            job_name="longsift-finish",
            depends=score,
            logging_dir=str(logs / "finish"),
            slurm_logs_folder=str(logs / "slurm"),
            **executor,
        )
        try:
            finish.run()
        except subprocess.CalledProcessError as error:
            raise UsageError(f"sbatch refused the jobs ({error}); its message is above.") from error
        finally:
            numbers = [str(each.job_id) for each in (score, finish) if each.job_id is not None]
            write_json(jobs / "slurm.json", {"jobs": numbers})
    return {"jobs": numbers, "tasks": tasks, "shards": len(left), "logs": str(logs)}


def _check_ended(jobs: Path) -> None:
    """Refuse to begin while jobs of an earlier command are waiting or running: both would write the same files."""
    try:
        numbers = json.loads((jobs / "slurm.json").read_text("utf-8"))["jobs"]
    except FileNotFoundError:
        return
    if not numbers:
        return
    asked = ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(numbers)}"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise OutputError(
            f"squeue cannot tell whether the jobs {', '.join(numbers)} have ended: {answer.stderr.strip()}"
        )
    if answer.stdout.strip():
        raise OutputError(
            f"Jobs of an earlier command are still in Slurm. Wait for them, or end them: scancel {' '.join(numbers)}."
        )
