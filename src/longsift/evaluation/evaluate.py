"""`longsift evaluate`: how well each method, layer and head tells coherent windows from controls."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from longsift import __version__
from longsift.calculators.full import FullModel
from longsift.errors import UsageError
from longsift.evaluation.auc import Interval, aucs, resampled_aucs
from longsift.evaluation.controls import PAIRED
from longsift.evaluation.signals import Meter, Signals, draw_samples, measure_samples
from longsift.methods.calibrated import EMBEDDED, STATISTICS, Calibration, Fit, weigh
from longsift.methods.longattn import LongAttn
from longsift.options import ControlOptions, MeterOptions, ModelOptions
from longsift.shards import write_json
from longsift.tables import publish

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

MEAN = "mean of groups"
DEGENERATE = "degenerate"  # all windows of generated text together
_DRAWS, _HEAD_DRAWS = 1000, 200  # resamplings: of scores and layers, and of single heads

SCORES = {
    "longattn": "LongAttn, as published: Z(DS) + 0.5·Z(DU), first layer",
    "longattn-strength": "LongAttn's dependency strength alone",
    "ladm": "LADM, as published: mean of CDS over layers",
    "ladm-zscore": "LADM, each layer z-scored within the group before the mean",
    "ladm-dense": "LADM of every pair of spans, causal denominator: mean over layers",
    "ladm-dense-zscore": "the same, each layer z-scored within the group before the mean",
    "calibrated": "chosen heads, weighed by a calibration",
}
"""The scores that are compared, as a user would get them; each belongs to the method that its name begins with."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Coherent windows of one group, and controls of one kind that they should stand above."""

    kind: str
    group: str
    coherent: npt.NDArray[np.int64]  # row numbers
    controls: npt.NDArray[np.int64]


def evaluate(
    inputs: Sequence[str],
    out: Path | str,
    model: ModelOptions = ModelOptions(),
    options: ControlOptions = ControlOptions(),
    meter: MeterOptions = MeterOptions(),
    *,
    calibration: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Draw coherent windows of a corpus, make their controls, and say which score tells them apart.

    Writes `evaluation.json` (the result), `heads.parquet` (every head, with intervals), `evaluation.html` (a page), and
    the measures themselves, from which an interrupted evaluation goes on.

    Args:
        inputs: files, folders, globs or urls of documents, or one run folder.
        out: folder.
        calibration: file of `longsift calibrate`; by default that of the embedded calculator, when it measures.
        overwrite: throw away what another calculator measured in `out`.

    Returns:
        "scores": one entry a score, kind and group with its AUC and 95 % interval; "layers": the same of each layer's
        CDS; "heads": of every head's statistics, the mean of groups; and what was measured with what.

    Raises:
        InputError, ModelError, OutputError, UsageError: as the steps do.
    """
    from longsift.evaluation.page import write_page

    started = time.perf_counter()
    measuring = Meter(model, meter)
    measuring.check(options.window)
    fit = _fit(calibration, measuring, options.window)
    samples = draw_samples(inputs, model, options)
    signals = measure_samples(samples, measuring, out, overwrite=overwrite, quiet=quiet)
    result = {
        "longsift": __version__,
        "calculator": signals.about["calculator"],
        "calibration": None if fit is None else calibration or "embedded",
        "options": {**asdict(options), **asdict(meter), "inputs": list(inputs)},
        "windows": _counts(signals),
        **compare(signals, fit),
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder = Path(out)
    with publish(folder / "heads.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(result["heads"]), temporary, compression="zstd")
    # Of single heads the file for people holds the means; there are tens of thousands of the rest.
    result["heads"] = [row for row in result["heads"] if row["group"] == MEAN]
    write_json(folder / "evaluation.json", result)
    write_page(result, folder / "evaluation.html")
    return result


def estimate(
    inputs: Sequence[str], model: ModelOptions, options: ControlOptions, meter: MeterOptions
) -> dict[str, Any]:
    """What `evaluate` would measure, and how long that takes, from measuring one window twice."""
    measuring = Meter(model, meter)
    measuring.check(options.window)
    samples = draw_samples(inputs, model, options)
    measuring.measure(samples[0].input_ids)
    started = time.perf_counter()
    measuring.measure(samples[0].input_ids)
    seconds = time.perf_counter() - started
    return {
        "coherent": sum(sample.kind == "coherent" for sample in samples),
        "controls": sum(sample.kind != "coherent" for sample in samples),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "seconds": round(seconds * len(samples), 1),
    }


def compare(signals: Signals, fit: Fit | None = None) -> dict[str, Any]:
    """AUCs of all scores, layers and heads.

    Args:
        signals: of coherent windows and controls.
        fit: of a calibration for this calculator; without it the score "calibrated" is left out.

    Returns:
        "scores", "layers" and "heads": one entry a column, kind and group (and mean of groups) with "auc", "low" and
        "high"; a column is a "score", a "statistic" of a "layer", or a "statistic" of a "layer" and "head".
    """
    comparisons = list(_comparisons(signals))
    whole = [c for c in comparisons if not c.kind.startswith(f"{DEGENERATE}/")]  # each kind of text only for scores
    rules = {c.group: user_scores(signals, c.coherent, fit) for c in comparisons}
    by_group = {group: np.stack([*scores.values()], axis=-1) for group, scores in rules.items()}
    names = [{"score": name} for name in next(iter(rules.values()))]
    result = {"scores": _table(signals, comparisons, names, by_group), "layers": [], "heads": []}
    if "cds" in signals.values:
        labels = [{"statistic": name, "layer": layer} for name in ("cds", "cds_dense") for layer in signals.layers]
        values = np.concatenate([signals.values["cds"], signals.values["cds_dense"]], axis=1)
        result["layers"] = _table(signals, whole, labels, dict.fromkeys(rules, values))
    for labels, values in _head_columns(signals):
        result["heads"] += _table(signals, whole, labels, dict.fromkeys(rules, values), _HEAD_DRAWS)
    return result


def user_scores(signals: Signals, reference: npt.NDArray[np.int64], fit: Fit | None = None) -> dict[str, Floats]:
    """The scores of all windows as a user would get them in one group.

    Args:
        reference: rows of the group's real windows, of which the mean and deviation of every z-score are taken.
        fit: of a calibration.

    Returns:
        (n,) of each of `SCORES` for which there are measures.
    """

    def standard(values: Floats) -> Floats:
        """Column by column: (n, columns); a column that does not vary says nothing."""
        deviation = values[reference].std(axis=0)
        standardised: Floats = (values - values[reference].mean(axis=0)) / np.where(deviation > 0, deviation, np.inf)
        return standardised

    values = signals.values
    scores: dict[str, Floats] = {}
    if "strength" in values:
        strength, variance = (values[name].mean(axis=1, keepdims=True) for name in ("strength", "variance"))
        scores["longattn"] = (standard(strength) - LongAttn().alpha * standard(variance))[:, 0]
        scores["longattn-strength"] = strength[:, 0]
    for name in ("cds", "cds_dense"):
        if name in values:
            slug = name.replace("cds", "ladm").replace("_", "-")
            scores[slug] = values[name].mean(axis=1)
            scores[f"{slug}-zscore"] = standard(values[name]).mean(axis=1)
    if fit is not None and "heads" in values:
        scores["calibrated"] = calibrated_scores(signals, fit)
    return scores


def calibrated_scores(signals: Signals, fit: Fit) -> Floats:
    """The score of `--method calibrated` for every row, (n,).

    Raises:
        UsageError: the fit looks at spans of another size, or at a layer that was not measured.
    """
    if fit.span != signals.about["span"]:
        raise UsageError(f"The calibration measures spans of {fit.span} tokens: evaluate with --span {fit.span}.")
    if missing := sorted(set(fit.heads) - set(signals.layers)):
        raise UsageError(
            f"The calibration looks at the layers {missing}, which do not see a whole window of this length."
        )
    places = [(signals.layers.index(each.layer), each.head, STATISTICS.index(each.statistic)) for each in fit.features]
    layers, heads, statistics = zip(*places, strict=True)
    values = signals.values["heads"][:, layers, heads, statistics]
    score: Floats = weigh(fit.features, torch.from_numpy(values)).numpy()
    return score


def _fit(calibration: str | None, meter: Meter, length: int) -> Fit | None:
    if "calibrated" not in meter.methods or not isinstance(meter.calculator, FullModel):
        if calibration is not None:
            raise UsageError("--calibration is for the method calibrated: name it in --method.")
        return None
    identity = meter.calculator.identity()
    if calibration is None:
        if identity["name"] != "embedded" or not EMBEDDED.is_file():
            log.warning("no --calibration was given, so the score 'calibrated' is left out; heads are measured")
            return None
        calibration = str(EMBEDDED)
    read = Calibration.read(Path(calibration))
    read.check_model(identity)
    return read.fit_for(length)


def _comparisons(signals: Signals) -> Iterator[Comparison]:
    kinds, groups = signals.samples["kind"], signals.samples["group"]
    present = list(dict.fromkeys(kinds.tolist()))
    order = [kind for kind in PAIRED if kind in present]
    order += sorted(kind for kind in present if kind.startswith("natural/"))
    generated = [kind for kind in present if kind.startswith(f"{DEGENERATE}/")]
    order += [DEGENERATE, *sorted(generated)] if generated else []
    for group in sorted({*groups[kinds == "coherent"].tolist()}):
        coherent = np.flatnonzero((kinds == "coherent") & (groups == group))
        for kind in order:
            of_kind = np.isin(kinds, generated) if kind == DEGENERATE else kinds == kind
            controls = np.flatnonzero(of_kind & (groups == group if kind in PAIRED else True))
            if len(controls):
                yield Comparison(kind, group, coherent, controls)


def _table(
    signals: Signals,
    comparisons: Sequence[Comparison],
    labels: Sequence[dict[str, Any]],
    values: Mapping[str, Floats],
    draws: int = _DRAWS,
) -> list[dict[str, Any]]:
    """AUCs of the columns of `values[group]`, (n, columns), in every comparison and in the mean over its groups."""
    documents = signals.samples["doc_id"]
    groups = list(values)
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(comparison.kind for comparison in comparisons):
        found: list[Floats] = []
        resampled: list[Floats] = []
        names: list[str] = []
        for comparison in comparisons:
            if comparison.kind == kind:
                names.append(comparison.group)
                of_group = values[comparison.group]
                sides = of_group[comparison.coherent], of_group[comparison.controls]
                drawn = documents[comparison.coherent].tolist(), documents[comparison.controls].tolist()
                found.append(aucs(*sides))
                resampled.append(resampled_aucs(*sides, *drawn, n=draws, seed=groups.index(comparison.group)))
        found.append(np.mean(found, axis=0))
        resampled.append(np.mean(resampled, axis=0))
        for group, auc, some in zip([*names, MEAN], found, resampled, strict=True):
            for i, label in enumerate(labels):
                interval = asdict(Interval.of(auc[i], some[:, i]))
                rounded = {key: round(value, 4) for key, value in interval.items()}
                rows.append({**label, "kind": kind, "group": group, **rounded})
    return rows


def _head_columns(signals: Signals) -> Iterator[tuple[list[dict[str, Any]], Floats]]:
    """The statistics of every head side by side, (n, columns), and what each column is."""
    values = signals.values
    tables: list[tuple[tuple[str, ...], tuple[int, ...], Floats]] = []
    if "strength" in values:
        first = np.stack([values["strength"], values["variance"]], axis=-1)[:, None]
        tables.append((("strength", "variance"), (0,), first))
    if "heads" in values:
        tables.append((STATISTICS, signals.layers, values["heads"]))
    for statistics, layers, array in tables:
        places = np.ndindex(array.shape[1:])
        labels = [{"layer": layers[i], "head": head, "statistic": statistics[j]} for i, head, j in places]
        yield labels, array.reshape(len(array), -1)


def _counts(signals: Signals) -> dict[str, Any]:
    kinds, groups = signals.samples["kind"], signals.samples["group"]
    coherent = groups[kinds == "coherent"]
    return {
        "coherent": {group: int((coherent == group).sum()) for group in sorted({*coherent.tolist()})},
        "controls": {kind: int((kinds == kind).sum()) for kind in sorted({*kinds.tolist()}) if kind != "coherent"},
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What a person wants to see of a result first: the scores by kind of control, mean over groups, and the files."""
    of_mean = [row for row in result["scores"] if row["group"] == MEAN]
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in of_mean) if not kind.startswith(f"{DEGENERATE}/")]
    table = []
    for score in dict.fromkeys(row["score"] for row in of_mean):
        line: dict[str, Any] = {"score": score}
        for row in of_mean:
            if row["score"] == score and row["kind"] in kinds:
                line[row["kind"]] = f"{row['auc']:.3f} ({row['low']:.2f}–{row['high']:.2f})"
        table.append(line)
    calculator = result["calculator"]
    return {
        "calculator": f"{calculator['model']}, {calculator['dtype']} on {calculator['device']}",
        "window": result["options"]["window"],
        "coherent": ", ".join(f"{group} {count}" for group, count in result["windows"]["coherent"].items()),
        "controls": sum(result["windows"]["controls"].values()),
        "seconds": result["seconds"],
        "AUC, mean of groups (95 % interval)": {"": table},
    }


def read_evaluation(out: Path | str) -> dict[str, Any]:
    """The result that `evaluate` wrote to a folder."""
    content: dict[str, Any] = json.loads((Path(out) / "evaluation.json").read_text("utf-8"))
    return content
