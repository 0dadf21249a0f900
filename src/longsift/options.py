"""What a user can ask for: one dataclass a concern, read by the command line, `--config` files and the Python API.

A field's help text stands in its metadata, so that a flag is described in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from longsift.errors import UsageError


def _flag(default: Any, help: str, flag: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "flag": flag})


def _check(options: Any, name: str, holds: Callable[[Any], bool], what: str) -> None:
    value = getattr(options, name)
    if value is not None and not holds(value):
        raise UsageError(f"--{name.replace('_', '-')} is {what}, not '{value}'.")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The calculator."""

    model: str | None = _flag(
        None,
        "Calculator: embedded, a folder, a .safetensors file, or org/name[@revision]. "
        "Default: the one that the windows were cut for, or embedded.",
    )
    revision: str | None = _flag(None, "Revision of a Hugging Face id.")
    trust_remote_code: bool = _flag(False, "Run code that comes with the checkpoint.", "--trust-remote-code")

    def __post_init__(self) -> None:
        for name in ("model", "revision"):
            _check(self, name, lambda value: value != "", "a name")


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """Reading documents and cutting windows."""

    text_key: str = _flag("text", "Column of the text; a dotted path works.")
    id_key: str = _flag("id", "Column of the document's id; made from file and row where absent.")
    group_by: str | None = _flag(None, "Column of the group; a dotted path works. Default: source, where present.")
    tab_ids: bool = _flag(False, "Lines are 'id<TAB>{json}'.", "--tab-ids")
    window: int | None = _flag(None, "Tokens in a window. Default: 32768, or what the calculator supports.")
    sample: int | None = _flag(None, "Keep only N windows, drawn uniformly from the corpus.")
    seed: int = _flag(0, "Seed of --sample.")
    limit: int | None = _flag(None, "Read at most N documents.")
    cut_workers: int | None = _flag(
        None, "Processes that tokenise and cut. Default: one a core, fewer for small inputs."
    )
    max_bad: float = _flag(0.001, "Share of bad rows (or failed windows) above which the exit code is 1.")
    shard_tokens: int = _flag(1 << 20, "Tokens in a shard, the unit in which windows are scored and a run goes on.")
    piece_bytes: int = _flag(
        1 << 28, "Bytes of a file that are cut as one piece, by one task of a cluster. Compressed files are one piece."
    )

    def __post_init__(self) -> None:
        for name in ("window", "sample", "limit", "cut_workers", "shard_tokens", "piece_bytes"):
            _check(self, name, lambda value: value >= 1, "at least 1")
        _check(self, "max_bad", lambda value: 0 <= value <= 1, "a share from 0 to 1")
        _check(self, "seed", lambda value: -(2**63) <= value < 2**63, "a 64-bit number")
        for name in ("text_key", "id_key", "group_by"):
            _check(self, name, lambda value: value != "", "the name of a column")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Measuring windows. A parameter left at None is the method's own default."""

    method: str = _flag("calibrated", "Selection method: calibrated, longattn or ladm.")
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = _flag("auto", "auto, float32, bfloat16 or float16.")
    batch_tokens: int | None = _flag(
        None, "Tokens sent to the device together. Default: 262144 on a GPU, one window on a CPU."
    )
    workers: int | None = _flag(None, "Processes that score. Default: one a GPU; a CPU needs one.")
    calibration: str | None = _flag(
        None, "calibrated: file of `longsift calibrate`. Default: that of the embedded calculator."
    )
    rope_theta: float | None = _flag(None, "Override the calculator's RoPE base.")
    layers: str | None = _flag(None, "ladm: layers to measure, such as 4,8,12-15. Default: all that see far.")
    span: int | None = _flag(None, "ladm: tokens in a span. [default: 128]")
    d_afs: int | None = _flag(None, "ladm: spans between compared key spans. [default: 4]")
    d_cds: int | None = _flag(None, "ladm: spans between measured query spans. [default: 4]")
    ablation: str | None = _flag(None, "ladm: no-std or no-len-weight.")
    denominator: str | None = _flag(None, "ladm: prior or causal. [default: prior]")
    dense: bool | None = _flag(None, "ladm: measure every pair of spans.", "--dense")
    alpha: float | None = _flag(None, "longattn: weight of uniformity. [default: 0.5]")
    normalize: str | None = _flag(None, "longattn: zscore or minmax, within groups. [default: zscore]")
    detail: bool | None = _flag(None, "longattn: also write the values of every head.", "--detail")
    skip_sink: bool | None = _flag(None, "longattn: never count the first 128 tokens as far.", "--skip-sink")
    query_fraction: str | None = _flag(
        None, "longattn: share of the queries to measure, such as 1/8 or 0.125. [default: 1, all of them]"
    )
    layer_aggregation: str | None = _flag(
        None, "ladm: mean of the layers, or mean of their zscore within groups. [default: mean]"
    )

    def __post_init__(self) -> None:
        _check(self, "rope_theta", lambda value: 0 < value < math.inf, "a positive number")
        for name in ("batch_tokens", "workers"):
            _check(self, name, lambda value: value >= 1, "at least 1")

    def method_parameters(self) -> dict[str, Any]:
        """The parameters that belong to the method rather than to the calculator."""
        others = {"method", "device", "dtype", "batch_tokens", "workers", "rope_theta", "layers"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where windows are scored; what is left at None has the engine's default."""

    engine: Literal["local", "slurm", "ray"] = _flag(
        "local",
        "local: processes of this machine. slurm: a job array; needs longsift[datatrove]. ray: tasks of a Ray cluster; "
        "needs longsift[datatrove,ray].",
    )
    address: str | None = _flag(
        None, "ray: address of the cluster, HOST:PORT. [default: that of RAY_ADDRESS, or the cluster of this machine]"
    )
    partition: str | None = _flag(None, "slurm: partition of the jobs.")
    tasks: int | None = _flag(None, "slurm, ray: tasks, each one process. [default: one a shard, at most 64]")
    gpus_per_task: int | None = _flag(None, "slurm, ray: GPUs of a task: 1, or 0 to score on CPUs. [default: 1]")
    cpus_per_task: int | None = _flag(None, "slurm, ray: cores of a task. [default: 4]")
    mem_per_cpu: int | None = _flag(None, "slurm, ray: GB of memory a core. [default: 4]")
    time: str | None = _flag(None, "slurm: time limit of a task. [default: 24:00:00]")
    sbatch: str | None = _flag(None, "slurm: further options of sbatch, such as account=lab,constraint=h100.")

    def __post_init__(self) -> None:
        for name in ("tasks", "cpus_per_task", "mem_per_cpu"):
            _check(self, name, lambda value: value >= 1, "at least 1")
        _check(self, "gpus_per_task", lambda value: value in (0, 1), "0 or 1")
        _check(self, "address", lambda value: value != "", "HOST:PORT")
        for f in fields(self):
            engines = f.metadata["help"].partition(":")[0]
            if f.name != "engine" and getattr(self, f.name) is not None and self.engine not in engines.split(", "):
                flag = f.name.replace("_", "-")
                raise UsageError(f"--{flag} goes with --engine {engines.replace(', ', ' or ')}.")
        if self.engine == "slurm" and not self.partition:
            raise UsageError("--engine slurm needs --partition; sinfo lists them.")
        self.further()

    @property
    def gpus(self) -> int:
        """The GPUs of a task."""
        return 1 if self.gpus_per_task is None else self.gpus_per_task

    @property
    def cpus(self) -> int:
        """The cores of a task."""
        return self.cpus_per_task or 4

    def of_tasks(self, options: ScoreOptions) -> ScoreOptions:
        """The options of scoring in a task, with its device, which this machine need not have.

        Raises:
            UsageError: options of the local engine.
        """
        if options.device != "auto" or options.workers is not None:
            raise UsageError(
                "--device and --workers go with --engine local; --gpus-per-task and --tasks say it to "
                f"{self.engine.capitalize()}."
            )
        return replace(options, device="cuda" if self.gpus else "cpu")

    def further(self) -> dict[str, str]:
        """The options of sbatch that `sbatch` names, by name without dashes."""
        pairs = [part.partition("=") for part in (self.sbatch or "").split(",") if part]
        if any(not name.strip() for name, _, _ in pairs):
            raise UsageError(f"--sbatch takes options such as account=lab,constraint=h100, not '{self.sbatch}'.")
        return {name.strip().lstrip("-"): value for name, _, value in pairs}


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Keeping the best windows of every group."""

    keep: float | None = _flag(None, "Share of the windows to keep in every group. [default: 0.125]")
    budget: int | None = _flag(None, "Tokens to keep: the same top share of every group.")
    mix: str | None = _flag(None, "Shares of the kept tokens by group: arxiv=0.3,book=0.3.")
    overlap: bool = _flag(
        False,
        "Rank overlapping windows of a document alike. Otherwise the better goes before, and the other is kept only "
        "where its group has no windows left that overlap none.",
        "--overlap/--no-overlap",
    )
    dedup: Literal["exact"] | None = _flag(None, "exact: keep one of all windows with the same token ids.")
    format: Literal["parquet", "jsonl"] = _flag("parquet", "Format of the data set.")
    text: bool = _flag(True, "Write the windows' text.", "--text/--no-text")
    input_ids: bool = _flag(True, "Write the windows' token ids.", "--ids/--no-ids")


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Drawing coherent windows of a corpus and making their controls."""

    text_key: str = _flag("text", "Column of the text; a dotted path works.")
    id_key: str = _flag("id", "Column of the document's id; made from file and row where absent.")
    group_by: str | None = _flag(None, "Column of the group; a dotted path works. Default: source, where present.")
    limit: int | None = _flag(None, "Read at most N documents.")
    window: int = _flag(8192, "Tokens in a window.")
    segment: int = _flag(512, "Tokens in a segment that is exchanged or moved.")
    per_group: int = _flag(48, "Documents drawn in each group.")
    per_document: int = _flag(1, "Windows of a document at most; they do not overlap.")
    per_kind: int = _flag(8, "Windows of each kind of degenerate text.")
    kinds: str = _flag(
        "mixed,shuffled,far-half,pieces,degenerate", "Controls to make; one kind of text is degenerate/NAME."
    )
    groups: str | None = _flag(None, "Groups of real documents: arxiv,book. Default: all but the control groups.")
    control_groups: str | None = _flag(None, "Groups without long-range dependency, which real ones are compared with.")
    seed: int = _flag(0, "Seed of the draw and of the controls.")

    def __post_init__(self) -> None:
        for name in ("window", "segment", "per_group", "per_document", "per_kind", "limit"):
            _check(self, name, lambda value: value >= 1, "at least 1")
        _check(self, "seed", lambda value: -(2**63) <= value < 2**63, "a 64-bit number")
        for name in ("text_key", "id_key", "group_by"):
            _check(self, name, lambda value: value != "", "the name of a column")

    def names(self, option: str) -> tuple[str, ...] | None:
        """The names in a list such as `kinds`, `groups` or `control_groups`; None where it was not given."""
        value = getattr(self, option)
        return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class MeterOptions:
    """What is measured of the windows of an evaluation, and on what."""

    method: str = _flag("all", "longattn, ladm, calibrated, several of them (longattn,ladm) or all.")
    span: int = _flag(128, "Tokens in a span.")
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = _flag("auto", "auto, float32, bfloat16 or float16.")
    rope_theta: float | None = _flag(None, "Override the calculator's RoPE base.")

    def __post_init__(self) -> None:
        _check(self, "rope_theta", lambda value: 0 < value < math.inf, "a positive number")
        _check(self, "span", lambda value: value >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Choosing heads and weights on controls."""

    heads: int = _flag(32, "Heads to choose at most.")
    max_depth: float = _flag(0.6, "Share of the layers within which they are chosen.")
    folds: int = _flag(4, "Into which documents are split: each is tested by a fit on the others.")
    span: int = _flag(128, "Tokens in a span.")
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = _flag("auto", "auto, float32, bfloat16 or float16.")
    rope_theta: float | None = _flag(None, "Override the calculator's RoPE base.")

    def __post_init__(self) -> None:
        for name in ("heads", "span"):
            _check(self, name, lambda value: value >= 1, "at least 1")
        _check(self, "folds", lambda value: value >= 2, "at least 2")
        _check(self, "max_depth", lambda value: 0 < value <= 1, "a share of the layers, above 0 and up to 1")
        _check(self, "rope_theta", lambda value: 0 < value < math.inf, "a positive number")


@dataclass(frozen=True, kw_only=True)
class NeedleOptions:
    """Asking a language model for keys hidden in long texts."""

    lengths: str = _flag("2048,8192", "Needle: lengths in tokens.")
    depths: str = _flag("0,0.25,0.5,0.75,1", "Needle: depths of the key, from 0 (first) to 1 (last).")
    trials: int = _flag(10, "Needle: questions for each length and depth.")
    keys: int = _flag(4, "Needle: keys in the text when several are hidden.")
    candidates: int = _flag(100, "Needle: keys among which the true one should be the likeliest.")

    def __post_init__(self) -> None:
        _check(self, "trials", lambda value: value >= 1, "at least 1")
        _check(self, "keys", lambda value: 2 <= value <= 16, "from 2 to 16")
        _check(self, "candidates", lambda value: 2 <= value <= 1000, "from 2 to 1000")
        _check(
            self,
            "lengths",
            lambda _: self._within("lengths", int, 1, math.inf),
            "a list of numbers of tokens: 2048,8192",
        )
        _check(self, "depths", lambda _: self._within("depths", float, 0, 1), "a list of numbers from 0 to 1: 0,0.5,1")

    def _within(self, option: str, kind: Callable[[str], Any], lowest: float, highest: float) -> bool:
        try:
            return all(lowest <= value <= highest for value in self.numbers(option, kind))
        except ValueError:
            return False

    def numbers(self, option: str, kind: Callable[[str], Any]) -> list[Any]:
        """The numbers in a list such as `lengths` or `depths`."""
        return [kind(part) for part in getattr(self, option).split(",")]


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Looking at one window."""

    document: str | None = _flag(None, "Of a file of documents: the id or the number, from 0, of one. Default: 0.")
    index: int = _flag(0, "Of a document longer than a window: which window, from 0.")
    text_key: str = _flag("text", "Column of the text; a dotted path works.")
    id_key: str = _flag("id", "Column of the document's id.")
    window: int | None = _flag(
        None, "Tokens in a window; a shorter text is one as it is. Default: 32768, or what the calculator supports."
    )
    span: int | None = _flag(None, "Tokens in a passage. Default: 128, more for windows of over 32,768.")
    layers: str | None = _flag(None, "Layers to measure, such as 4,8,12-15. Default: all that see the whole window.")
    denominator: Literal["causal", "prior"] | None = _flag(
        None, "Shares of all attention (causal), or of that to the text before a passage (prior). [default: causal]"
    )
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = _flag("auto", "auto, float32, bfloat16 or float16.")
    rope_theta: float | None = _flag(None, "Override the calculator's RoPE base.")

    def __post_init__(self) -> None:
        for name in ("window", "span"):
            _check(self, name, lambda value: value >= 1, "at least 1")
        _check(self, "index", lambda value: value >= 0, "at least 0")
        _check(self, "rope_theta", lambda value: 0 < value < math.inf, "a positive number")
        for name in ("document", "text_key", "id_key"):
            _check(self, name, lambda value: value != "", "a name")
