"""The Slurm engine: job arrays cut and score the windows of a run folder, through datatrove's executor.

One job array follows the other. A single job after each does what is left, as the same command would have without
Slurm: it tries again what could not be read, or was set aside, and ends the stage.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from longsift import pipeline
from longsift.cutting import begin_windows, can_be_cut_elsewhere, cut_sources
from longsift.engines.tasks import CountLines, CutPieces, ScoreShards, deal, for_tasks, new_logs, tasks_at_most
from longsift.errors import UsageError
from longsift.jobs import check_ended, note_slurm_jobs, noted
from longsift.options import EngineOptions, ModelOptions, ScoreOptions, SelectOptions, WindowOptions
from longsift.pieces import uncounted
from longsift.scoring import score_identity
from longsift.scoring_stage import check_tokenizer, model_of, windows_to_score
from longsift.shards import RunFolder
from longsift.sources import find_sources, listed_sources
from longsift.tables import parquet_files

try:
    from datatrove.executor import SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise UsageError("--engine slurm needs datatrove: pip install 'longsift[datatrove]'") from error


class FinishWindows(PipelineStep):  # type: ignore[misc]
    """End the cutting of a run whose pieces of files are cut."""

    type = "FINISH"
    name = "longsift windows"

    def __init__(
        self, out: Path, logs: Path, model: ModelOptions, options: WindowOptions, selection: SelectOptions | None
    ) -> None:
        super().__init__()
        self.out, self.logs = str(out), str(logs)
        self.model, self.options, self.selection = model, options, selection

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do it; files that cannot be read fail the job, and nothing is scored."""
        folder = RunFolder(self.out)
        with noted(self.logs, rank), folder.lock():
            sources = listed_sources(folder.manifest()["windows"]["identity"]["inputs"])
            cut_sources(sources, folder, self.model, self.options, overwrite=False, quiet=False)
            if self.selection is not None:
                pipeline.check_mix(self.out, self.selection)
        yield from ()


class FinishRun(PipelineStep):  # type: ignore[misc]
    """Finish a run whose shards are scored: its manifest and, where asked for, the selection and the report."""

    type = "FINISH"
    name = "longsift run"

    def __init__(
        self,
        out: Path,
        logs: Path,
        model: ModelOptions,
        options: ScoreOptions,
        selection: SelectOptions | None,
        max_bad: float,
    ) -> None:
        super().__init__()
        self.out, self.logs = str(out), str(logs)
        self.model, self.options, self.selection, self.max_bad = model, options, selection, max_bad

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do it; too many bad rows fail the job at its end."""
        with noted(self.logs, rank):
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
    windows: WindowOptions,
    inputs: Sequence[str] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Have Slurm score the windows of a run folder, and cut them before; what is done already stays.

    Args:
        out: the run folder.
        selection: select and report when all is scored.
        windows: how they are cut; `windows.max_bad` is the share of bad rows or failed windows above which the last
            job fails.
        inputs: the documents; None where the windows are cut. What only one process can cut is cut here and now.
        overwrite: throw away windows or scores of other parameters.

    Returns:
        The numbers of the jobs, of tasks that score, of pieces left to cut and of shards left to score (None while that
        depends on the pieces), and the folder of the logs.

    Raises:
        UsageError: `sbatch` refuses, or options cannot work.
        InputError: nothing to read.
        OutputError: no windows, windows or scores of other parameters, or jobs of an earlier command that have not
            ended.
    """
    folder = RunFolder(Path(out).resolve())
    sources = [] if inputs is None else find_sources(inputs)
    if inputs is not None and not can_be_cut_elsewhere(sources, windows):
        pipeline.cut(inputs, out, model, windows, overwrite=overwrite, quiet=quiet)
        sources = []
    options = engine.of_tasks(options)
    shards: list[str] | None = None
    with folder.lock():
        check_ended(folder.path)
        chain = _Chain(engine, new_logs(folder.path))
        if sources and not begin_windows(sources, folder, model, windows, overwrite=overwrite):
            model, length = replace(model, model=model.model or "embedded"), windows.window
            done = folder.records("windows")
            pieces = [shard for shard in folder.pieces() if shard not in done]
            if lines := uncounted(folder):
                chain.array("lines", folder, lines, CountLines)
            if pieces:
                cut = partial(CutPieces, model=model, options=for_tasks(windows, engine))
                chain.array("windows", folder, pieces, cut)
            logs = chain.logs / "windows-end"
            chain.one(FinishWindows(folder.path, logs, model, for_tasks(windows, engine), selection), logs)
        else:
            pieces = []
            section = windows_to_score(folder)
            model, length = model_of(section, model), section["length"]
            check_tokenizer(section, model)
            if selection is not None:
                pipeline.check_mix(out, selection)
        identity = score_identity(model.model or "embedded", model.revision, options, length, elsewhere=True)
        finished = folder.begin("scores", identity, overwrite=overwrite)
        if finished and selection is None and not pieces:
            return {"jobs": [], "tasks": 0, "pieces": 0, "shards": 0, "logs": None}
        if not chain:
            done = {} if finished else folder.records("scores")
            shards = [] if finished else [path.name for path in parquet_files(folder.windows) if path.stem not in done]
        score = partial(ScoreShards, model=model, options=options)
        tasks = chain.array("score", folder, shards, score, gpus=engine.gpus)
        logs = chain.logs / "end"
        chain.one(FinishRun(folder.path, logs, model, options, selection, windows.max_bad), logs, gpus=engine.gpus)
        try:
            chain.submit()
        except subprocess.CalledProcessError as error:
            raise UsageError(f"sbatch refused the jobs ({error}); its message is above.") from error
        finally:
            note_slurm_jobs(folder.path, chain.numbers())
    return {
        "jobs": chain.numbers(),
        "tasks": tasks,
        "pieces": len(pieces),
        "shards": None if shards is None else len(shards),
        "logs": str(chain.logs),
    }


class _Chain:
    """Jobs of which each begins when the one before has done its work."""

    def __init__(self, engine: EngineOptions, logs: Path) -> None:
        self.logs, self._engine = logs, engine
        self._jobs: list[SlurmPipelineExecutor] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def array(
        self,
        name: str,
        folder: RunFolder,
        names: Sequence[str] | None,
        step: Callable[..., PipelineStep],
        *,
        gpus: int = 0,
    ) -> int:
        """Add an array whose tasks do a step on names, or on what there will be, if that is None; returns how many."""
        logs = self.logs / name
        listed, tasks = (None, tasks_at_most(self._engine)) if names is None else deal(names, self._engine, logs)
        self._add(step(folder.path, listed, logs), logs, tasks, gpus)
        return tasks

    def one(self, step: PipelineStep, logs: Path, *, gpus: int = 0) -> None:
        """Add a single job."""
        self._add(step, logs, 1, gpus)

    def submit(self) -> None:
        """Submit all.

        Raises:
            CalledProcessError: sbatch refuses.
        """
        self._jobs[-1].run()

    def numbers(self) -> list[str]:
        """Of the jobs that are submitted."""
        return [str(job.job_id) for job in self._jobs if job.job_id is not None]

    def _add(self, step: PipelineStep, logs: Path, tasks: int, gpus: int) -> None:
        engine = self._engine
        self._jobs.append(
            SlurmPipelineExecutor(
                [step],
                tasks=tasks,
                job_name=f"longsift-{logs.name}",
                depends=self._jobs[-1] if self._jobs else None,
                logging_dir=str(logs),
                slurm_logs_folder=str(self.logs / "slurm"),
                time=engine.time or "24:00:00",
                partition=engine.partition,
                cpus_per_task=engine.cpus,
                mem_per_cpu_gb=engine.mem_per_cpu or 4,
                gpus_per_task=gpus,
                qos="",
                env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
                sbatch_args={"kill-on-invalid-dep": "yes", **engine.further()},
            )
        )
