"""What a calculator's attention says of many windows: every head's statistics, LADM's and LongAttn's measures.

One forward a window; what was measured lies in a folder of Parquet files, so that a run that was stopped goes on
where it was, and a look at other numbers measures nothing again. `python -m longsift.evaluation.signals INPUT… -o OUT`
does it from the command line, for a machine where only this is to be done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from longsift.attention import span_focus
from longsift.calculators import LayerAttention
from longsift.calculators.checkpoint import Checkpoint, locate
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.errors import ModelError, OutputError, UsageError
from longsift.evaluation.controls import Sample, build_controls, draw
from longsift.methods.calibrated import STATISTICS, head_statistics
from longsift.methods.ladm import Ladm
from longsift.methods.longattn import far_attention
from longsift.options import ControlOptions, MeterOptions, ModelOptions
from longsift.pieces import load_tokenizer
from longsift.progress import Progress
from longsift.scoring import resolve_device, resolve_dtype
from longsift.shards import write_json
from longsift.tables import parquet_files, publish

log = logging.getLogger(__name__)

METHODS = ("longattn", "ladm", "calibrated")
_PART_SECONDS = 60.0  # measured windows are written at least so often
_KEYS = ("key", "kind", "group", "doc_id", "fold")


@dataclass(frozen=True, slots=True)
class Signals:
    """Measures of n windows by one calculator; an array that was not asked for is missing from `values`.

    Attributes:
        samples: what each row is of: `kind`, `group`, `doc_id` and `fold` as in `controls.Sample`, and its `key`.
        layers: the measured layers, by index.
        values: "heads" (n, layers, heads, statistics) with `STATISTICS` of spans of `span` tokens; "cds" and
            "cds_dense" (n, layers), LADM as published and with every pair of spans under the causal denominator;
            "strength" and "variance" (n, heads) of the first layer, LongAttn's.
        about: the calculator, the length and the span, as they were recorded.
    """

    samples: dict[str, npt.NDArray[Any]]
    layers: tuple[int, ...]
    values: dict[str, npt.NDArray[np.float64]]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.samples["key"])

    def where(self, rows: npt.NDArray[Any]) -> Signals:
        """The rows that a mask or a list of indices picks."""
        samples = {name: column[rows] for name, column in self.samples.items()}
        return Signals(samples, self.layers, {name: array[rows] for name, array in self.values.items()}, self.about)


class Meter:
    """A calculator, and what is to be measured with it.

    Args:
        model: the calculator.
        options: the methods, the span, and where and how it runs. "longattn" alone reads the first layer only.

    Attributes:
        methods: what is measured. Of "all", LongAttn is left out where the first layer does not see a whole window.

    Raises:
        ModelError: a calculator that cannot be loaded.
        UsageError: no such method.
    """

    def __init__(self, model: ModelOptions = ModelOptions(), options: MeterOptions = MeterOptions()) -> None:
        asked = METHODS if options.method == "all" else tuple(options.method.split(","))
        if unknown := sorted(set(asked) - set(METHODS)):
            raise UsageError(f"--method takes all, or some of {', '.join(METHODS)}, not '{unknown[0]}'.")
        self.methods = tuple(method for method in METHODS if method in asked)
        self.span = options.span
        self._all = options.method == "all"
        self._published = Ladm(span=options.span)
        self._dense = Ladm(span=options.span, dense=True, denominator="causal")
        # A model that was trained on in the same folder is another one.
        self._fingerprint = Checkpoint(locate(model.model or "embedded", model.revision)).fingerprint()
        load = FirstLayer.load if self.methods == ("longattn",) else FullModel.load
        self.calculator: FirstLayer | FullModel = load(
            model.model or "embedded",
            revision=model.revision,
            device=resolve_device(options.device),
            dtype=resolve_dtype(options.dtype),
            rope_theta=options.rope_theta,
            trust_remote_code=model.trust_remote_code,
        )

    def check(self, length: int) -> None:
        """Refuse windows that are too short for what is to be measured, and a first layer that does not see far.

        Raises:
            UsageError: too short.
            ModelError: no layer sees the whole window, or LongAttn is asked of a sliding first layer.
        """
        least = max(8 * self.span, self._published.shortest() if "ladm" in self.methods else 0)
        if isinstance(self.calculator, FullModel):
            if length < least:
                raise UsageError(
                    f"--window {length} is shorter than the {least:,} tokens that {' and '.join(self.methods)} need "
                    f"with spans of {self.span}. Use longer windows or a shorter --span."
                )
            seeing = self.calculator.global_layers(length)
            if "longattn" in self.methods and 0 not in seeing:
                why = (
                    f"LongAttn measures the first layer, and that of this model sees only part of a window of {length} "
                    f"tokens (the layers {list(seeing)} see all of it)"
                )
                if not self._all:
                    raise ModelError(f"{why}. Evaluate the others: --method ladm,calibrated.")
                self.methods = tuple(method for method in self.methods if method != "longattn")
                log.warning("%s, so it is left out", why)

    def measure(self, input_ids: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.float64]]:
        """The arrays of `Signals.values` for one window, without their first axis, and "layers".

        Raises:
            ModelError: the window cannot be measured, or a measure is not finite.
        """
        ids = torch.from_numpy(input_ids.astype(np.int64))[None]
        with torch.inference_mode():
            if isinstance(self.calculator, FirstLayer):
                layers, rows = [0], [_first_layer(self.calculator.queries_keys(ids))]
            else:
                reduced = self.calculator.reduce(ids, self._reduce)
                layers, rows = list(reduced), list(reduced.values())
        values = {"layers": np.array(layers, dtype=np.float64)}
        for name in dict.fromkeys(name for row in rows for name in row):
            values[name] = torch.stack([row[name] for row in rows if name in row]).double().cpu().numpy()
        for name in ("strength", "variance"):
            if name in values:
                values[name] = values[name][0]  # of the first layer only
        if bad := [name for name, array in values.items() if not np.isfinite(array).all()]:
            raise ModelError(f"the measures {', '.join(bad)} are not finite; with half precision, try --dtype float32")
        return values

    def identity(self, length: int) -> dict[str, Any]:
        """Everything that measures of windows of `length` tokens depend on."""
        about = self.calculator.describe()
        about.pop("bytes_read", None)
        return {
            "calculator": about,
            "fingerprint": self._fingerprint,
            "methods": list(self.methods),
            "span": self.span,
            "length": length,
        }

    def _reduce(self, layer: LayerAttention) -> dict[str, torch.Tensor]:
        """What is kept of one layer; tensors stay on the device, so that no layer waits for the one before."""
        kept: dict[str, torch.Tensor] = {}
        length = layer.q.shape[2]
        sees = {"scale": layer.scale, "softcap": layer.softcap}
        if {"ladm", "calibrated"} & set(self.methods):
            focus = span_focus(layer.q, layer.k, self.span, denominator="causal", **sees)[0]  # type: ignore[arg-type]
            kept["heads"] = head_statistics(focus / self.span)
        if "ladm" in self.methods:
            dense = focus.mean(0)[list(self._dense.query_spans(length))].double()
            kept["cds_dense"] = self._dense.contextual_dependency(dense, length)
            sampled = span_focus(
                layer.q,
                layer.k,
                self.span,
                denominator="prior",
                query_spans=self._published.query_spans(length),
                average_heads=True,
                **sees,  # type: ignore[arg-type]
            )[0]
            kept["cds"] = self._published.contextual_dependency(sampled.double(), length)
        if layer.layer == 0 and "longattn" in self.methods:
            kept |= _first_layer(layer)
        return kept


def _first_layer(layer: LayerAttention) -> dict[str, torch.Tensor]:
    far = far_attention(layer)
    return {"strength": far.strength[0], "variance": far.variance[0]}


def draw_samples(inputs: Sequence[str], model: ModelOptions, options: ControlOptions, folds: int = 1) -> list[Sample]:
    """Draw coherent windows and make their controls, as the options say.

    Args:
        folds: into which documents are split; no control mixes documents of two folds.

    Raises:
        InputError, UsageError: as `draw_coherent` and `build_controls`.
    """
    tokenizer = load_tokenizer(model.model or "embedded", model.revision, model.trust_remote_code)
    drawn = draw(inputs, tokenizer, options.window, options, folds)
    controls = build_controls(
        drawn,
        kinds=options.names("kinds") or (),
        segment=options.segment,
        seed=options.seed,
        tokenizer=tokenizer,
        per_kind=options.per_kind,
    )
    return [*drawn, *controls]


def measure_samples(
    samples: Sequence[Sample], meter: Meter, out: Path | str, *, overwrite: bool = False, quiet: bool = False
) -> Signals:
    """Measure windows, and keep what is measured in a folder.

    Args:
        samples: of one length.
        out: folder; what it holds of the same calculator is not measured again.
        overwrite: throw away what another calculator measured there.
        quiet: no progress.

    Returns:
        One row a sample, in their order.

    Raises:
        ModelError: a window that cannot be measured.
        OutputError: the folder holds measures of another calculator, span or length.
    """
    folder = Path(out)
    length = len(samples[0].input_ids)
    meter.check(length)
    _begin(folder, meter.identity(length), overwrite)
    done = set(_read_keys(folder))
    left = [sample for sample in {s.key: s for s in samples}.values() if sample.key not in done]
    total = sum(len(sample.input_ids) for sample in samples)
    resumed = total - sum(len(sample.input_ids) for sample in left)
    rows: list[dict[str, Any]] = []
    written = time.monotonic()
    try:
        with Progress("signals", total, "tokens", done=resumed, quiet=quiet) as progress:
            for sample in left:
                rows.append(_measured(sample, meter))
                progress.advance(len(sample.input_ids), windows=1)
                if time.monotonic() - written > _PART_SECONDS:
                    _write(folder, rows)
                    rows, written = [], time.monotonic()
    finally:  # what was measured before an interruption or a window that fails
        _write(folder, rows)
    return read_signals(folder, [sample.key for sample in samples])


def read_signals(out: Path | str, keys: Sequence[str] | None = None) -> Signals:
    """Read what `measure_samples` left in a folder.

    Args:
        keys: of the rows that are wanted, in the order that is wanted; default all, as they were measured.

    Raises:
        OutputError: no such folder, or it lacks a wanted row.
    """
    folder = Path(out)
    try:
        about = json.loads((folder / "signals.json").read_text("utf-8"))
        table = pa.concat_tables([pq.read_table(path) for path in parquet_files(folder / "signals")])
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{folder} holds no measures ({error}). Run longsift evaluate INPUT --out {folder}."
        ) from error
    if keys is not None:
        row = {key: i for i, key in enumerate(table["key"].to_pylist())}
        if missing := [key for key in keys if key not in row]:
            raise OutputError(f"{folder} lacks the measures of {len(missing)} windows. Run longsift evaluate again.")
        table = table.take([row[key] for key in keys])
    values = {}
    for name in table.column_names:
        if name not in _KEYS:
            column = table[name].combine_chunks()
            values[name] = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(table), -1)
    layers = tuple(int(layer) for layer in values.pop("layers")[0])
    if "heads" in values:
        values["heads"] = values["heads"].reshape(len(table), len(layers), -1, len(STATISTICS))
    samples = {name: np.array(table[name].to_pylist()) for name in _KEYS}
    return Signals(samples, layers, values, about)


def _begin(folder: Path, identity: dict[str, Any], overwrite: bool) -> None:
    identity = json.loads(json.dumps({**identity, "statistics": list(STATISTICS)}))
    path = folder / "signals.json"
    if path.is_file() and not overwrite:
        try:
            same = json.loads(path.read_text("utf-8")) == identity
        except ValueError as error:
            raise OutputError(f"{path} is damaged ({error}). Start again with --overwrite.") from error
        if not same:
            raise OutputError(
                f"{folder} holds measures of another model, length or span. Choose another folder, or --overwrite."
            )
    if overwrite:
        for part in parquet_files(folder / "signals"):
            part.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def _read_keys(folder: Path) -> Iterator[str]:
    for path in parquet_files(folder / "signals"):
        yield from pq.read_table(path, columns=["key"])["key"].to_pylist()


def _measured(sample: Sample, meter: Meter) -> dict[str, Any]:
    try:
        values = meter.measure(sample.input_ids)
    except ModelError as error:
        raise ModelError(f"A window of '{sample.doc_id}' ({sample.kind}) was not measured: {error}") from error
    # Statistics of all heads take the room; a float32 tells windows apart as well.
    cells = {name: (array.astype(np.float32) if name == "heads" else array).ravel() for name, array in values.items()}
    return {name: getattr(sample, name) for name in _KEYS} | cells


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        parts = folder / "signals"
        parts.mkdir(parents=True, exist_ok=True)
        with publish(parts / f"{len(list(parts.glob('*.parquet'))):05d}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")


def _main(arguments: Sequence[str] | None = None) -> None:
    """`python -m longsift.evaluation.signals`: draw, make controls, measure."""
    parser = argparse.ArgumentParser(prog="python -m longsift.evaluation.signals", description=_main.__doc__)
    parser.add_argument("inputs", nargs="+", help="documents")
    parser.add_argument("-o", "--out", required=True, help="folder of the measures")
    parser.add_argument("--folds", type=int, default=4, help="folds of documents")
    parser.add_argument("--overwrite", action="store_true")
    groups = (ModelOptions, ControlOptions, MeterOptions)
    types = {"int": int, "float": float}
    for field in (field for group in groups for field in dataclasses.fields(group)):
        kind = str(field.type).split(" ")[0]
        how: dict[str, Any] = {"type": types.get(kind, str), "default": field.default}
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, help=field.metadata["help"], **({"action": "store_true"} if kind == "bool" else how))
    given = vars(parser.parse_args(arguments))
    model, control, meter = ({f.name: given[f.name] for f in dataclasses.fields(group)} for group in groups)
    samples = draw_samples(given["inputs"], ModelOptions(**model), ControlOptions(**control), given["folds"])
    measuring = Meter(ModelOptions(**model), MeterOptions(**meter))
    measure_samples(samples, measuring, given["out"], overwrite=given["overwrite"])


if __name__ == "__main__":
    _main()
