"""The Scorer: windows in, score rows out.

Windows of one length go to the device together, up to a number of tokens, and no padding, no batch neighbour and no
restart can change a score. The next batch is under way before the results of the last one are read.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from longsift.batches import Batch, Prefetched, Row, Shard, group_rows, ids_hash, read_rows
from longsift.calculators.checkpoint import Checkpoint, locate
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel, existing_layers
from longsift.calculators.interface import read_config
from longsift.errors import ModelError, UsageError
from longsift.methods import Method, build_method, parameters_of
from longsift.methods.calibrated import Calibrated
from longsift.options import ModelOptions, ScoreOptions
from longsift.pieces import load_tokenizer
from longsift.tables import SCORE_KEYS
from longsift.windows import WindowTokenizer, window_starts

log = logging.getLogger(__name__)

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GPU_BATCH_TOKENS = 1 << 18  # eight windows of 32,768: enough that a GPU never waits for the host
_AHEAD = 4  # batches and ends of shards that are laid out ahead of need

T = TypeVar("T")


class Scorer:
    """A method and the calculator that it measures with, loaded once.

    Args:
        method: "calibrated", "longattn", "ladm", or a method object.
        model: "embedded", a folder, a `.safetensors` file, or a Hugging Face id `org/name[@revision]`.
        device: "auto" takes the GPU where there is one.
        dtype: "auto" is float32 on a CPU and the checkpoint's own on a GPU.
        rope_theta: replaces the calculator's RoPE base.
        layers: ladm only: the layers to measure, by index; default all that attend globally.
        batch_tokens: tokens of the windows that are sent to the device together; default 262,144 on a GPU, and one
            window at a time on a CPU. It changes the speed and the memory, never a score.
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
        batch_tokens: int | None = None,
        **parameters: Any,
    ) -> None:
        self.method = build_method(method, **parameters) if isinstance(method, str) else method
        _check_layers(self.method, layers)
        _check_calculator(self.method, model, revision, rope_theta)
        self.model = model
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.device = resolve_device(device)
        on_gpu = self.device.type == "cuda"
        self.batch_tokens = batch_tokens or (_GPU_BATCH_TOKENS if on_gpu else 1)
        self._most: dict[int, int] = {}  # windows of a length that fit in the memory together, where not all did
        options: dict[str, Any] = {
            "revision": revision,
            "device": self.device,
            "dtype": resolve_dtype(dtype),
            "rope_theta": rope_theta,
            "trust_remote_code": trust_remote_code,
        }
        self._tokenizer: WindowTokenizer | None = None
        self.calculator: FirstLayer | FullModel
        with self._on_device():
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
            batch_tokens=options.batch_tokens,
            **options.method_parameters(),
        )

    def measure(self, input_ids: Sequence[int] | npt.NDArray[np.int32]) -> dict[str, Any]:
        """Measure one window of token ids.

        Returns:
            The method's columns, by name.

        Raises:
            ModelError: the window cannot be measured (too short, foreign ids, not finite, too long for the memory).
        """
        result = self.measure_batch([input_ids])[0]
        if isinstance(result, ModelError):
            raise result
        return result

    def measure_batch(
        self, windows: Sequence[Sequence[int] | npt.NDArray[np.int32]]
    ) -> list[dict[str, Any] | ModelError]:
        """Measure windows of token ids, of any lengths; a window's measures are the same bits as if it were alone.

        Returns:
            For every window the method's columns by name, or why it cannot be measured.
        """
        rows = [Row({}, np.asarray(ids), len(ids)) for ids in windows]
        for _ in self._run(self._prepare(rows)):
            pass
        return [_result(row) for row in rows]

    def score_shards(
        self, windows: Iterable[Path], advance: Callable[[int, bool], None] | None = None
    ) -> Iterator[tuple[Path, pa.Table]]:
        """Measure the windows of Parquet files; files are read, and batches laid out, while others are measured.

        Args:
            windows: is iterated in a thread.
            advance: called for every window with its tokens and whether it was measured.

        Yields:
            Each file and its scores, in the file's order.
        """
        with Prefetched(self._prepare_files(windows), _AHEAD, self._on_device) as prefetched:
            for item in self._run(prefetched, prefetched.ready):
                if isinstance(item, Shard):
                    yield item.path, self._table(item.rows)
                elif advance is not None:
                    for row in item.rows if isinstance(item, Batch) else [item]:
                        advance(row.n_tokens, not isinstance(row.result, ModelError))

    def score_shard(self, windows: Path, advance: Callable[[int, bool], None] | None = None) -> pa.Table:
        """Measure the windows of one Parquet file; the rows come back in the file's order."""
        return next(table for _, table in self.score_shards([windows], advance))

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
        rows: list[Row] = []
        for i, item in enumerate(windows):
            keys: dict[str, Any] = {"doc_id": str(i), "group": groups[i] if groups is not None else "all"}
            cuts = self._cut(item, window) if isinstance(item, str) else [(0, np.asarray(item, dtype=np.int32))]
            for index, (start, ids) in enumerate(cuts):
                own = {"window_id": f"{i}:{index}", "start": start, "n_tokens": len(ids), "ids_hash": ids_hash(ids)}
                rows.append(Row(keys | own, ids, len(ids)))
        for _ in self._run(self._prepare(rows)):
            pass
        return self._table(rows)

    def select(
        self,
        scores: pa.Table,
        *,
        keep: float | None = None,
        budget: int | None = None,
        overlap: bool = False,
        dedup: Literal["exact"] | None = None,
    ) -> pa.Table:
        """Keep the best windows of every group of a table of `score`.

        Args:
            keep: share of every group; or
            budget: tokens in all, the same top share of every group.
            overlap: rank overlapping windows of a text alike. Otherwise, as by default in `longsift select`, the better
                goes before, and the other is kept only where its group has no windows left that overlap none.
            dedup: "exact" keeps one of all windows with the same token ids.

        Returns:
            The kept rows, best first within their group, with `score` and `rank`.

        Raises:
            UsageError: not one of `keep` and `budget`, or a value out of range.
            OutputError: the table lacks a column that is needed.
        """
        from longsift.selection import select_table

        return select_table(scores, self.method.rule(), keep=keep, budget=budget, overlap=overlap, dedup=dedup)

    def _cut(self, text: str, window: int | None) -> list[tuple[int, npt.NDArray[np.int32]]]:
        """The windows of a text and where they start in its tokens."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model, self.revision, self.trust_remote_code)
        tokenizer = self._tokenizer
        ids = tokenizer.encode([text])[0].ids
        room = len(ids) if window is None else window - len(tokenizer.prefix) - len(tokenizer.suffix)
        return [
            (start, np.concatenate([tokenizer.prefix, ids[start : start + room], tokenizer.suffix]))
            for start in window_starts(len(ids), room)
        ]

    def schema(self) -> pa.Schema:
        """The schema of the scores table of this method."""
        return pa.schema([*SCORE_KEYS, *self.method.columns()])

    def describe(self) -> dict[str, Any]:
        """The calculator as it was loaded, for a manifest."""
        return self.calculator.describe()

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _table(self, rows: Sequence[Row]) -> pa.Table:
        table = []
        for row in rows:
            result = _result(row)
            failed = isinstance(result, ModelError)
            state = {"status": "failed", "reason": str(result)} if failed else {"status": "ok"}
            table.append(row.keys | state | ({} if isinstance(result, ModelError) else result))
        return pa.Table.from_pylist(table, schema=self.schema())

    def _prepare_files(self, windows: Iterable[Path]) -> Iterator[Batch | Row | Shard]:
        for path in windows:
            shard = Shard(path)
            yield from self._prepare(shard.keep(read_rows(path)))
            yield shard

    def _prepare(self, rows: Iterable[Row]) -> Iterator[Batch | Row]:
        """Batches of the windows that can be measured, and the rows of those that cannot."""
        refused: deque[Row] = deque()

        def fit() -> Iterator[Row]:
            for row in rows:
                row.result = self._refusal(row)
                if row.result is None:
                    yield row
                else:
                    row.input_ids = None
                    refused.append(row)

        for batch in group_rows(fit(), self.batch_tokens, pinned=self.device.type == "cuda"):
            yield batch
            while refused:
                yield refused.popleft()
        yield from refused

    def _refusal(self, row: Row) -> ModelError | None:
        if row.n_tokens < self.method.shortest():
            return ModelError(f"shorter than the {self.method.shortest():,} tokens that {self.method.name} needs")
        assert row.input_ids is not None
        low, high, size = int(row.input_ids.min()), int(row.input_ids.max()), self.calculator.vocab_size
        if low < 0 or high >= size:
            return ModelError(
                f"Token id {low if low < 0 else high} is outside the model's vocabulary of {size}. "
                "Tokenise with the tokenizer of the model that scores."
            )
        return None

    def _run(self, stream: Iterator[T], ready: Callable[[], bool] = lambda: True) -> Iterator[T]:
        """Measure the batches of a stream and give its items back in their order, batches when their rows have results.

        A batch is read back after the next one is under way, or when there is no next one yet.

        Args:
            ready: whether the next item of the stream is there without a wait.
        """
        under_way: deque[tuple[T, list[_Flight]]] = deque()

        def waits(flights: list[_Flight]) -> bool:
            return any(flight.done is not None for flight in flights)

        def batches_under_way() -> int:
            return sum(waits(flights) for _, flights in under_way)

        def landed() -> T:
            item, flights = under_way.popleft()
            for flight in flights:
                flight.land()
            return item

        while True:
            # Ends of shards do not count: they must not make the host wait for the batch before them.
            while under_way and (batches_under_way() > 1 or not waits(under_way[0][1]) or not ready()):
                yield landed()
            item = next(stream, None)
            if item is None:
                break
            under_way.append((item, self._launch(item) if isinstance(item, Batch) else []))
        while under_way:
            yield landed()

    def _launch(self, batch: Batch) -> list[_Flight]:
        """Send a batch to the device, in parts where it does not fit as a whole."""
        length = batch.ids.shape[1]
        left = deque([batch])
        flights: list[_Flight] = []
        released = False  # before this very window was tried again
        while left:
            part = left.popleft()
            size = len(part.rows)
            if size > (most := self._most.get(length, size)):
                left.extendleft(reversed(part.parts(most)))
                continue
            outcome = self._attempt(part)
            if isinstance(outcome, _Failure) and outcome.out_of_memory and (size > 1 or not released):
                self._release()
                left.appendleft(part)
                if size > 1:
                    self._remember(length, size, -(-size // 2))
                else:
                    released = True
                continue
            if isinstance(outcome, _Flight):
                flights.append(outcome)
            elif size > 1:  # perhaps one of them alone is to blame
                left.extendleft(reversed(part.parts(1)))
            else:
                part.rows[0].result = outcome.reason
            released = False
        return flights

    def _attempt(self, batch: Batch) -> _Flight | _Failure:
        try:
            with torch.inference_mode(), self._on_device():
                ids = batch.ids.to(self.device, non_blocking=True).long()
                return _Flight.begin(batch.rows, self.method.measure(self.calculator, ids))
        except ModelError as error:
            return _Failure(error, out_of_memory=False)
        except Exception as error:
            if _is_out_of_memory(error):
                # Not the error itself: it would keep the frames alive, and with them the tensors.
                return _Failure(ModelError(f"out of memory at {batch.ids.shape[1]:,} tokens"), out_of_memory=True)
            _note_windows(error, batch.rows)
            raise

    def _release(self) -> None:
        """Give back what the allocator holds; batches under way are finished first, since theirs is in use."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _remember(self, length: int, size: int, most: int) -> None:
        if length not in self._most:
            log.warning(
                "%d windows of %d tokens do not fit in the memory together: fewer from now on (--batch-tokens)",
                size,
                length,
            )
        self._most[length] = most


@dataclass(frozen=True, slots=True)
class _Failure:
    """Windows that were not measured, and why."""

    reason: ModelError
    out_of_memory: bool


@dataclass(frozen=True, slots=True)
class _Flight:
    """Measures that are being computed and copied back."""

    rows: list[Row]
    columns: dict[str, torch.Tensor | list[Any]]
    done: torch.cuda.Event | None

    @classmethod
    def begin(cls, rows: list[Row], measures: dict[str, torch.Tensor | list[Any]]) -> _Flight:
        """Begin to copy the measures of `rows` back to the host."""
        columns = dict(measures)
        done = None
        for name, value in measures.items():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                columns[name] = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
                # A blocking event waits without keeping a core busy.
                done = done or torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        if done is not None:
            done.record()
        return cls(rows, columns, done)

    def land(self) -> None:
        """Wait for the measures, and give every row its own."""
        if self.done is not None:
            try:
                self.done.synchronize()
            except Exception as error:
                _note_windows(error, self.rows)
                raise
        finite = np.ones(len(self.rows), dtype=bool)
        values: dict[str, list[Any]] = {}
        for name, column in self.columns.items():
            if isinstance(column, torch.Tensor):
                finite &= torch.isfinite(column).reshape(len(self.rows), -1).all(1).numpy()
                values[name] = column.tolist()
            else:  # the same for every window
                values[name] = [column] * len(self.rows)
        for i, row in enumerate(self.rows):
            measured = {name: column[i] for name, column in values.items()}
            row.result = measured if finite[i] else ModelError("the measures are not finite")


def _result(row: Row) -> dict[str, Any] | ModelError:
    assert row.result is not None
    return row.result


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: PyTorch's own error, or that of a library or driver, which has no type of its own."""
    texts = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def _note_windows(error: Exception, rows: Sequence[Row]) -> None:
    first, others = rows[0].keys.get("window_id"), len(rows) - 1
    error.add_note(f"while measuring window {first!r}" + (f" and {others} more of its length" if others else ""))


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
    model: str, revision: str | None, options: ScoreOptions, window: int | None = None, *, elsewhere: bool = False
) -> dict[str, Any]:
    """Everything that scores depend on, as JSON values, checked without loading a model.

    Args:
        window: tokens in a window, where that is known: it must be long enough for the method.
        elsewhere: the device is another machine's, and is not looked for here.

    Raises:
        UsageError: options that cannot work, or a calculator that the calibration was not made with.
        ModelError: a calibrated calculator that cannot be found.
    """
    method = build_method(options.method, **options.method_parameters())
    layers = parse_layers(options.layers)
    _check_layers(method, layers)
    resolve_dtype(options.dtype)
    device = options.device.partition(":")[0] if elsewhere else resolve_device(options.device).type
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


def check_layers(model: ModelOptions, options: ScoreOptions) -> None:
    """Refuse layers that the calculator does not have, from its configuration alone.

    Raises:
        UsageError: `layers` names such a layer.
        ModelError: the configuration cannot be read.
    """
    if (layers := parse_layers(options.layers)) is not None:
        location = locate(model.model or "embedded", model.revision)
        existing_layers(layers, read_config(location, trust_remote_code=model.trust_remote_code), location)


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
