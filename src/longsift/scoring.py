"""The Scorer: windows in, score rows out.

A window is measured alone: no padding, no batch neighbour and no restart can change its score.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from longsift.calculators.checkpoint import Checkpoint, locate
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.cutting import load_tokenizer
from longsift.errors import ModelError, UsageError
from longsift.methods import Method, build_method, parameters_of
from longsift.methods.calibrated import Calibrated
from longsift.options import ModelOptions, ScoreOptions
from longsift.tables import SCORE_KEYS, WINDOWS
from longsift.windows import WindowTokenizer, window_starts

log = logging.getLogger(__name__)

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_READ_ROWS = 16  # windows held at a time while a shard is read


class Scorer:
    """A method and the calculator that it measures with, loaded once.

    Args:
        method: "calibrated", "longattn", "ladm", or a method object.
        model: "embedded", a folder, a `.safetensors` file, or a Hugging Face id `org/name[@revision]`.
        device: "auto" takes the GPU where there is one.
        dtype: "auto" is float32 on a CPU and the checkpoint's own on a GPU.
        rope_theta: replaces the calculator's RoPE base.
        layers: ladm only: the layers to measure, by index; default all that attend globally.
        parameters: the method's own (`alpha`, `span`, …).

    Raises:
        UsageError: a parameter that the method does not have; a calculator that the calibration was not made with.
        ModelError: a calculator that cannot be loaded.
    """

    def __init__(
        self,
        method: str | Method = "calibrated",
        *,
        model: str = "embedded",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        rope_theta: float | None = None,
        layers: Sequence[int] | None = None,
        trust_remote_code: bool = False,
        **parameters: Any,
    ) -> None:
        self.method = build_method(method, **parameters) if isinstance(method, str) else method
        _check_layers(self.method, layers)
        _check_calculator(self.method, model, revision, rope_theta)
        self.model = model
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        options: dict[str, Any] = {
            "revision": revision,
            "device": resolve_device(device),
            "dtype": resolve_dtype(dtype),
            "rope_theta": rope_theta,
            "trust_remote_code": trust_remote_code,
        }
        self._tokenizer: WindowTokenizer | None = None
        self.calculator: FirstLayer | FullModel
        if self.method.calculator == "first_layer":
            self.calculator = FirstLayer.load(model, **options)
        else:
            calibrated = _calibrated(self.method)
            chosen = calibrated.layers() if calibrated else layers
            self.calculator = FullModel.load(model, layers=chosen, **options)

    @classmethod
    def from_options(cls, model: ModelOptions, options: ScoreOptions) -> Scorer:
        """The scorer that the command line's options ask for."""
        return cls(
            options.method,
            model=model.model or "embedded",
            revision=model.revision,
            device=options.device,
            dtype=options.dtype,
            rope_theta=options.rope_theta,
            layers=parse_layers(options.layers),
            trust_remote_code=model.trust_remote_code,
            **options.method_parameters(),
        )

    def measure(self, input_ids: Sequence[int] | npt.NDArray[np.int32]) -> dict[str, Any]:
        """Measure one window of token ids.

        Returns:
            The method's columns, by name.

        Raises:
            ModelError: the window cannot be measured (too short, foreign ids, not finite).
        """
        if len(input_ids) < self.method.shortest():
            raise ModelError(f"shorter than the {self.method.shortest():,} tokens that {self.method.name} needs")
        ids = torch.from_numpy(np.asarray(input_ids, dtype=np.int64))
        with torch.inference_mode():
            measures = self.method.measure(self.calculator, ids)
        if not all(map(math.isfinite, _floats(measures))):
            raise ModelError("the measures are not finite")
        return measures

    def score_shard(self, windows: Path, advance: Callable[[int, bool], None] | None = None) -> pa.Table:
        """Measure the windows of one Parquet file; the rows come back in the file's order.

        Args:
            advance: called after every window with its tokens and whether it was measured.
        """
        rows = []
        for keys, input_ids in _read_windows(windows):
            row = self._row(keys, input_ids)
            rows.append(row)
            if advance is not None:
                advance(len(input_ids), row["status"] == "ok")
        return pa.Table.from_pylist(rows, schema=self.schema())

    def score(
        self,
        windows: Sequence[str | Sequence[int]],
        *,
        window: int | None = None,
        groups: Sequence[str] | None = None,
    ) -> pa.Table:
        """Score texts or token ids that are at hand.

        Args:
            windows: texts, or windows as lists of token ids.
            window: cut texts into windows of so many tokens, as the command line does, and drop shorter ones;
                without it a text is one window, whatever its length.
            groups: the group of every item; default one group, "all".

        Returns:
            A table of scores (see `longsift.tables`), whose doc_id is the item's position.
        """
        rows: list[dict[str, Any]] = []
        for i, item in enumerate(windows):
            keys: dict[str, Any] = {"doc_id": str(i), "group": groups[i] if groups is not None else "all"}
            cuts = self._cut(item, window) if isinstance(item, str) else [np.asarray(item, dtype=np.int32)]
            for index, ids in enumerate(cuts):
                rows.append(self._row({**keys, "window_id": f"{i}:{index}", "n_tokens": len(ids)}, ids))
        return pa.Table.from_pylist(rows, schema=self.schema())

    def select(self, scores: pa.Table, *, keep: float | None = None, budget: int | None = None) -> pa.Table:
        """Keep the best windows of every group of a table of `score`.

        Args:
            keep: share of every group; or
            budget: tokens in all, the same top share of every group.

        Returns:
            The kept rows, best first within their group, with `score` and `rank`.
        """
        from longsift.selection import select_table

        return select_table(scores, self.method.rule(), keep=keep, budget=budget)

    def _cut(self, text: str, window: int | None) -> list[npt.NDArray[np.int32]]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model, self.revision, self.trust_remote_code)
        tokenizer = self._tokenizer
        ids = tokenizer.encode([text])[0].ids
        room = len(ids) if window is None else window - len(tokenizer.prefix) - len(tokenizer.suffix)
        return [
            np.concatenate([tokenizer.prefix, ids[start : start + room], tokenizer.suffix])
            for start in window_starts(len(ids), room)
        ]

    def schema(self) -> pa.Schema:
        """The schema of the scores table of this method."""
        return pa.schema([*SCORE_KEYS, *self.method.columns()])

    def describe(self) -> dict[str, Any]:
        """The calculator as it was loaded, for a manifest."""
        return self.calculator.describe()

    def _row(self, keys: dict[str, Any], input_ids: npt.NDArray[np.int32]) -> dict[str, Any]:
        try:
            return keys | {"status": "ok"} | self.measure(input_ids)
        except ModelError as error:
            return keys | {"status": "failed", "reason": str(error)}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return keys | {"status": "failed", "reason": f"out of GPU memory at {len(input_ids):,} tokens"}
        except Exception as error:
            error.add_note(f"while measuring window {keys['window_id']!r}")
            raise


def resolve_device(device: str) -> torch.device:
    """The torch device that `--device` names; "auto" is the GPU where there is one.

    Raises:
        UsageError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device takes auto, cpu, cuda or cuda:N, not '{device}'.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"There is no {device} here ({torch.cuda.device_count()} GPUs seen). Use --device cpu.")
    return chosen


def resolve_dtype(dtype: str) -> torch.dtype | None:
    """The torch type that `--dtype` names; "auto" is None, the calculator's choice.

    Raises:
        UsageError: no such type.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype takes {', '.join(_DTYPES)}, not '{dtype}'.")
    return _DTYPES[dtype]


def score_identity(
    model: str, revision: str | None, options: ScoreOptions, window: int | None = None
) -> dict[str, Any]:
    """Everything that scores depend on, as JSON values, checked without loading a model.

    Args:
        window: tokens in a window, where that is known: it must be long enough for the method.

    Raises:
        UsageError: options that cannot work, or a calculator that the calibration was not made with.
        ModelError: a calibrated calculator that cannot be found.
    """
    method = build_method(options.method, **options.method_parameters())
    layers = parse_layers(options.layers)
    _check_layers(method, layers)
    resolve_dtype(options.dtype)
    device = resolve_device(options.device).type
    _check_calculator(method, model, revision, options.rope_theta)
    if window is not None and window < method.shortest():
        raise UsageError(
            f"--window {window} is shorter than the {method.shortest():,} tokens that {method.name} needs."
        )
    return {
        "method": method.name,
        "parameters": parameters_of(method),
        "model": model,
        "revision": revision,
        "device": device,
        "dtype": options.dtype,
        "rope_theta": options.rope_theta,
        "layers": layers,
    }


def _calibrated(method: object) -> Calibrated | None:
    return method if isinstance(method, Calibrated) else None


def _check_layers(method: Method, layers: Sequence[int] | None) -> None:
    if layers is not None and method.calculator == "first_layer":
        raise UsageError(f"--layers does not apply to the method '{method.name}', which measures the first layer.")
    if layers is not None and _calibrated(method):
        raise UsageError("--layers does not apply to the method 'calibrated', whose calibration names the layers.")


def _check_calculator(method: Method, model: str, revision: str | None, rope_theta: float | None) -> None:
    """Refuse a calculator that a calibration was not made with, from samples of its files."""
    if calibrated := _calibrated(method):
        location = locate(model, revision)
        calibrated.loaded.check_model(
            {"name": location.name, "fingerprint": Checkpoint(location).fingerprint(), "rope_theta": rope_theta}
        )


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers such as "4,8,12-15" as indices, in order; None stays None.

    Raises:
        UsageError: not a list of numbers and ranges.
    """
    if text is None:
        return None
    layers: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            part_of = range(int(first), int(last or first) + 1)
            if not part_of or part_of[0] < 0:
                raise ValueError(part)
            layers.update(part_of)
    except ValueError as error:
        raise UsageError(f"--layers takes numbers and ranges such as 4,8,12-15, not '{text}'.") from error
    return tuple(sorted(layers))


def _read_windows(path: Path) -> Iterator[tuple[dict[str, Any], npt.NDArray[np.int32]]]:
    """The keys of every window of a file and its token ids, a few windows in memory at a time."""
    keys = [name for name in SCORE_KEYS.names if name in WINDOWS.names]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_READ_ROWS, columns=[*keys, "input_ids"]):
            ids = batch.column("input_ids")
            for i, row in enumerate(batch.select(keys).to_pylist()):
                yield row, ids[i].values.to_numpy()


def _floats(measures: dict[str, Any]) -> Iterator[float]:
    for value in measures.values():
        yield from value if isinstance(value, list) else (value,)
