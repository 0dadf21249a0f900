"""The scores stage: windows files become scores files, here or in processes, resumable, and while windows are cut."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from longsift.engines.local import Facts, LocalEngine, Shard, devices, facts_of, score_each
from longsift.errors import InputError, ShardsSetAside, UsageError
from longsift.measured import measured_groups
from longsift.methods import build_method
from longsift.options import EngineOptions, ModelOptions, ScoreOptions
from longsift.pieces import load_tokenizer
from longsift.progress import Progress
from longsift.shards import RunFolder
from longsift.tables import parquet_files

if TYPE_CHECKING:
    from longsift.engines.ray_cluster import RayEngine

log = logging.getLogger(__name__)

_SAY_EVERY = 2.0  # seconds between two notes for `longsift status`


class ScoreStage:
    """The scoring of a run folder, whose lock is held; a context manager, at whose end its processes are gone.

    Args:
        model: the calculator; by default the one that the windows were cut for.
        overwrite: throw away scores of other parameters.
        quiet: no progress.
        cluster: score on a Ray cluster, not here.
    """

    def __init__(
        self,
        folder: RunFolder,
        model: ModelOptions,
        options: ScoreOptions,
        *,
        overwrite: bool,
        quiet: bool,
        cluster: EngineOptions | None = None,
    ) -> None:
        self._folder, self._model, self._cluster = folder, model, cluster
        self._options = options if cluster is None else cluster.of_tasks(options)
        self._overwrite, self._quiet = overwrite, quiet
        self._done: set[str] = set()  # shards that need no scoring
        self._engine: LocalEngine | RayEngine | None = None
        self._progress: Progress | None = None
        self._tokens = 0  # that were measured when there was no progress yet
        self._clock = 0.0  # when the last shard was done, or the first begun
        self._said = 0.0  # when the last note for `longsift status` was written
        self._unpublished = 0  # tokens measured of shards that are under way
        self._devices: int | None = None  # that score together; None where that is not known
        self._here: deque[str] = deque()  # shards that this process itself is to score

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.__exit__(kind, error, trace)
        self._folder.forget_note()

    @property
    def apart(self) -> bool:
        """Whether windows are scored by a GPU here, or by other processes: then others can be cut meanwhile."""
        return self._cluster is None and _apart(devices(self._options))

    def offer(self, windows: Path) -> None:
        """Score a windows file while others are still being cut; processes are started at the first.

        Raises:
            OutputError: the folder holds scores of other parameters.
            LongsiftError: scoring has failed.
        """
        if self._engine is None:
            self._begin(None)
            self._start(devices(self._options))
        self._submit(windows)

    def check(self) -> None:
        """Raise what scoring has failed with, if it has."""
        if self._engine is not None:
            self._engine.check()

    def finish(self) -> dict[str, Any]:
        """Score all windows that have no scores yet.

        Returns:
            Counts (windows, failed, tokens), seconds, tokens_per_second, failures by reason, and the distribution of
            what was measured, by group (`longsift.measured.measured_groups`).

        Raises:
            OutputError: no windows, or scores of other parameters.
            InputError: not one window was cut.
            ModelError: a calculator that cannot be loaded, or that does not share the windows' tokenizer.
            ShardsSetAside: some shards could not be scored; all others are, and the stage ends as "incomplete".
            ProcessLost: no process could begin, or nothing but failures came.
        """
        windows = windows_to_score(self._folder)
        self._model = model_of(windows, self._model)
        if self._engine is None and self._begin(windows["length"]):
            return _result(self._folder)
        check_tokenizer(windows, self._model)
        facts = self._score_rest(windows["counts"]["tokens"])
        records = self._folder.records("scores").values()
        longest = max((record.get("longest", 0) for record in records), default=0)
        if facts.max_length is not None and longest > facts.max_length:
            log.warning("windows of %d tokens are longer than the %d of the calculator", longest, facts.max_length)
        reasons: Counter[str] = Counter()
        for record in records:
            reasons.update(record["reasons"])
        counts = {key: sum(record[key] for record in records) for key in ("windows", "failed", "tokens", "seconds")}
        results = {"calculator": facts.calculator, "counts": counts, "reasons": dict(reasons.most_common())}
        if all("devices" in record for record in records):
            results["device_seconds"] = round(sum(record["seconds"] * record["devices"] for record in records), 3)
        aside = self._folder.shards_set_aside()
        # Also where there are none now: there may have been before.
        results["set_aside"] = {"shards": len(aside), "windows": windows["counts"]["windows"] - counts["windows"]}
        if aside:
            self._folder.finish("scores", results, incomplete=True)
            raise ShardsSetAside(self._folder.explain_set_aside())
        self._folder.finish("scores", results)
        return _result(self._folder)

    def _begin(self, length: int | None) -> bool:
        from longsift.scoring import score_identity

        model = self._model
        identity = score_identity(
            model.model or "embedded", model.revision, self._options, length, elsewhere=self._cluster is not None
        )
        finished = self._folder.begin("scores", identity, overwrite=self._overwrite)
        self._folder.forget_set_aside()
        scores = self._folder.scores
        self._done = {name for name in self._folder.records("scores") if (scores / f"{name}.parquet").exists()}
        self._tokens = sum(record["tokens"] for record in self._folder.records("scores").values())
        return finished

    def _start(self, devices: list[str]) -> LocalEngine | RayEngine:
        parts = self._model, self._options
        if self._cluster is None:
            self._devices = len(set(devices))
            self._engine = LocalEngine(
                self._folder.scores, *parts, devices, on_ready=self._start_clock, **self._callbacks()
            )
        else:
            from longsift.engines.ray_cluster import RayEngine

            self._engine = RayEngine(
                self._folder, *parts, self._cluster, on_ready=self._start_clock, **self._callbacks()
            )
        return self._engine.__enter__()

    def _callbacks(self) -> dict[str, Any]:
        return {
            "on_done": self._record,
            "on_set_aside": self._set_aside,
            "on_advance": self._advance,
        }

    def _submit(self, windows: Path) -> None:
        assert self._engine is not None
        if windows.stem not in self._done:
            self._done.add(windows.stem)
            self._engine.submit(windows)

    def _score_rest(self, tokens: int) -> Facts:
        left = [path for path in parquet_files(self._folder.windows) if path.stem not in self._done]
        chosen = devices(self._options) if self._cluster is None else []
        if self._engine is None:
            chosen = chosen[: max(1, len(left))]
        processes, gpus = len(chosen), len(set(chosen))  # those on a CPU share one
        where = f" on {gpus} GPUs" if gpus > 1 else f" in {processes} processes" if processes > 1 else ""
        if self._cluster is not None:
            where = " on a Ray cluster"
        with Progress(f"scores{where}", tokens, "tokens", done=self._tokens, quiet=self._quiet) as self._progress:
            if self._engine is not None or self._cluster is not None or _apart(chosen):
                engine = self._engine or self._start(chosen)
                for path in left:
                    self._submit(path)
                return engine.finish()
            from longsift.scoring import Scorer

            scorer = Scorer.from_options(self._model, self._options)
            self._devices = 1
            self._here.extend(path.stem for path in left)
            self._start_clock()
            score_each(
                scorer,
                left,
                self._folder.scores,
                **self._callbacks(),
            )
            return facts_of(scorer)

    def _advance(self, tokens: int, windows: int, failed: int) -> None:
        self._unpublished += tokens
        self._note()
        if self._progress is None:
            self._tokens += tokens
        else:
            self._progress.advance(tokens, windows=windows, failed=failed)

    def _start_clock(self) -> None:
        self._clock = time.monotonic()
        self._note()

    def _note(self) -> None:
        """Write now and then for `longsift status` what is under way."""
        if time.monotonic() - self._said < _SAY_EVERY:
            return
        self._said = time.monotonic()
        under_way = list(self._here)[:1] if self._engine is None else self._engine.under_way()
        process = f"{os.getpid()} on {platform.node()}"
        with suppress(OSError):  # a disk that is full is the next table's to tell
            self._folder.note({"process": process, "shards": under_way, "tokens": self._unpublished})

    def _set_aside(self, windows: Path, why: str) -> None:
        log.warning("the shard %s is set aside: %s", windows.stem, why)
        self._folder.set_aside(windows.stem, why)
        self._end(windows.stem)

    def _end(self, shard: str) -> None:
        with suppress(ValueError):  # it was scored by another process
            self._here.remove(shard)

    def _record(self, shard: Shard) -> None:
        """Say that a shard is done; its seconds are those since the one before, whichever process scored it."""
        before = self._clock
        self._start_clock()
        self._unpublished -= shard.counts["tokens"]
        self._end(shard.name)
        self._folder.record("scores", shard.name, shard.record(self._clock - before, self._devices))


def _apart(devices: list[str]) -> bool:
    """Whether other processes score: several, or that of a GPU, whose faults spoil the process that meets them."""
    return len(devices) > 1 or devices[0] != "cpu"


def windows_to_score(folder: RunFolder) -> dict[str, Any]:
    """The manifest's section of the windows of a run folder.

    Raises:
        OutputError: they are not finished, or are another run's and were cut anew.
        InputError: there is not one.
    """
    windows = folder.section("windows")
    folder.check_linked_windows()
    counts = windows["counts"]
    if not counts["windows"]:
        raise InputError(
            f"There is no window to score: of {counts['documents']:,} documents {counts['too_short']:,} are too short, "
            f"and {counts['bad_rows']:,} rows are bad. Choose a smaller --window, or see {folder.quarantine}."
        )
    return windows


def model_of(windows: dict[str, Any], model: ModelOptions) -> ModelOptions:
    """The calculator that was asked for, or else the one that the windows were cut for."""
    if model.model is not None:
        return model
    return replace(
        model, model=windows["identity"]["model"], revision=model.revision or windows["identity"]["revision"]
    )


def check_tokenizer(windows: dict[str, Any], model: ModelOptions) -> None:
    """Refuse token ids of one tokenizer for a calculator with another: the scores would mean nothing."""
    known, identity = windows["tokenizer"], windows["identity"]
    name = model.model or "embedded"
    if known is None or (name, model.revision) == (identity["model"], identity["revision"]):
        return
    if load_tokenizer(name, model.revision, model.trust_remote_code).fingerprint != known:
        raise UsageError(
            f"The windows were cut with the tokenizer of '{identity['model']}', which '{name}' does not "
            f"share. Cut them anew: longsift windows INPUT -o OUT --model {name}."
        )


def _result(folder: RunFolder) -> dict[str, Any]:
    section = folder.section("scores")
    counts, identity = section["counts"], section["identity"]
    rule = build_method(identity["method"], **identity["parameters"]).rule()
    speed = counts["tokens"] / counts["seconds"] if counts["seconds"] else None
    return {
        "method": identity["method"],
        **counts,
        "tokens_per_second": speed,
        "reasons": [{"reason": reason, "windows": count} for reason, count in section["reasons"].items()],
        "distribution": measured_groups(folder.scores, rule),
    }
