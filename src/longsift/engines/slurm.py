"""The Slurm engine: a job array scores the windows of a run folder, through datatrove's executor.

The job that depends on the array tries again what its tasks have set aside, and finishes the run as the same command
would have without Slurm.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longsift import pipeline
from longsift.engines.tasks import ScoreShards, deal, new_logs
from longsift.errors import UsageError
from longsift.jobs import check_ended, note_slurm_jobs
from longsift.options import EngineOptions, ModelOptions, ScoreOptions, SelectOptions
from longsift.scoring import score_identity
from longsift.scoring_stage import check_tokenizer, model_of, windows_to_score
from longsift.shards import RunFolder
from longsift.tables import parquet_files

try:
    from datatrove.executor import SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise UsageError("--engine slurm needs datatrove: pip install 'longsift[datatrove]'") from error


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


def check(out: Path | str, options: ScoreOptions, engine: EngineOptions) -> None:
    """Find what cannot work before windows are cut.

    Raises:
        UsageError: no `sbatch` here, or options of the local engine.
        OutputError: jobs of an earlier command for the run folder `out` have not ended.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("There is no sbatch here. Run this on a machine that submits to the cluster.")
    engine.of_tasks(options)
    check_ended(Path(out))


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
    check_tokenizer(windows, model)
    options = engine.of_tasks(options)
    identity = score_identity(model.model or "embedded", model.revision, options, windows["length"], elsewhere=True)
    with folder.lock():
        check_ended(folder.path)
        finished = folder.begin("scores", identity, overwrite=overwrite)
        if finished and selection is None:
            return {"jobs": [], "tasks": 0, "shards": 0, "logs": None}
        done = folder.records("scores")
        left = [] if finished else [path.name for path in parquet_files(folder.windows) if path.stem not in done]
        logs = new_logs(folder.path)
        shards, tasks = deal(left, engine, logs)
        executor: dict[str, Any] = {
            "time": engine.time or "24:00:00",
            "partition": engine.partition,
            "cpus_per_task": engine.cpus_per_task or 4,
            "mem_per_cpu_gb": engine.mem_per_cpu or 4,
            "gpus_per_task": engine.gpus,
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
            note_slurm_jobs(folder.path, numbers)
    return {"jobs": numbers, "tasks": tasks, "shards": len(left), "logs": str(logs)}
