"""`longsift calibrate`: choose heads and weights that put coherent windows above controls of every kind.

A score is compared within groups, so it is trained on differences: a coherent window minus a control (ordinal
regression by pairs, Herbrich et al. 2000), in a logistic regression without intercept, ridge-regularised. Controls of
a group are set against that group, and, with half the weight, against every other one: text that does not hang
together should not win anywhere. Every kind and every group weighs the same however many windows it has.

Heads are chosen by what they weigh in fits that each leave one group out, the lightest dropped in rounds; the depth is
the shallowest that is as good as the best, on documents and on groups that a fit has not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longsift.calculators.full import FullModel
from longsift.errors import InputError, OutputError, UsageError
from longsift.evaluation.auc import Interval, aucs, resampled_aucs
from longsift.evaluation.controls import PAIRED
from longsift.evaluation.signals import Meter, Signals, draw_samples, measure_samples
from longsift.methods.calibrated import LARGEST_Z, SMALLEST, STATISTICS, Calibration, Feature, Fit
from longsift.options import CalibrateOptions, ControlOptions, MeterOptions, ModelOptions

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

# What a kind of control counts, all its groups together. A document's own segments in another order keep its
# far-apart repetitions, which is what far focus sees: trained on them too, the rest suffers (docs/quality.md).
COUNTS = {"mixed": 2.0, "pieces": 1.0, "far-half": 0.5, "shuffled": 0.0, "degenerate": 1.0, "natural": 1.0}
STRENGTHS = (2.0, 8.0)  # of the mean loss against half the squared weights
AS_GOOD = 0.003  # AUC by which a deeper choice must be better to be taken
_PAIRS = 4  # controls of each kind that a coherent window is compared with
_LEAST_SCALE = 0.02  # of a standardised logarithm: a statistic that hardly varies is not blown up
_DROPPED = 0.4  # of the heads, in a round of choosing


@dataclass(frozen=True)
class Table:
    """Statistics of some heads in coherent windows and controls.

    Attributes:
        logs: (windows, heads, statistics), logarithms of `head_statistics`.
        heads: (layer, head) of every column, shallow ones first.
        kind, group, fold, doc_id: of every window, as in `controls.Sample`.
    """

    logs: Floats
    heads: tuple[tuple[int, int], ...]
    kind: npt.NDArray[np.str_]
    group: npt.NDArray[np.str_]
    fold: npt.NDArray[np.int64]
    doc_id: npt.NDArray[np.str_]

    @classmethod
    def of(cls, signals: Signals) -> Table:
        values = signals.values["heads"]
        n, _, heads, _ = values.shape
        places = tuple((layer, head) for layer in signals.layers for head in range(heads))
        logs = np.log(values + SMALLEST).reshape(n, len(places), -1)
        return cls(logs, places, *(signals.samples[name] for name in ("kind", "group", "fold", "doc_id")))

    def where(self, rows: npt.NDArray[np.bool_]) -> Table:
        """The windows of a mask."""
        columns = {name: getattr(self, name)[rows] for name in ("logs", "kind", "group", "fold", "doc_id")}
        return replace(self, **columns)

    def take(self, heads: Sequence[int]) -> Table:
        """The heads of these columns."""
        return replace(self, logs=self.logs[:, heads], heads=tuple(self.heads[i] for i in heads))

    @property
    def groups(self) -> list[str]:
        return sorted({*self.group[self.kind == "coherent"].tolist()})

    @property
    def controls(self) -> list[str]:
        return sorted({*self.kind.tolist()} - {"coherent"})

    def coherent(self, group: str) -> Rows:
        return np.flatnonzero((self.kind == "coherent") & (self.group == group))

    def against(self, kind: str, group: str) -> Rows:
        """The controls of a kind that belong to a group or to all."""
        return np.flatnonzero((self.kind == kind) & ((self.group == group) | (self.group == "")))


@dataclass(frozen=True)
class Linear:
    """A score of a table: Σ weight · z + square · z² over (heads, statistics)."""

    mean: Floats
    scale: Floats
    weight: Floats
    square: Floats

    def score(self, table: Table) -> Floats:
        """(windows,)"""
        z = _standard(table.logs, self.mean, self.scale)
        return np.asarray(np.einsum("nhs,hs->n", z, self.weight) + np.einsum("nhs,hs->n", z * z, self.square))

    @property
    def importance(self) -> Floats:
        """Of every head, (heads,)."""
        return np.asarray(np.sqrt((self.weight**2 + self.square**2).sum(1)))


def fit_linear(table: Table, strength: float, seed: int = 0) -> Linear:
    """Train the score of all heads of a table.

    Args:
        strength: weight of the mean loss; larger regularises less.
        seed: of which control a coherent window is compared with.

    Raises:
        InputError: no kind of control that counts.
    """
    from sklearn.linear_model import LogisticRegression

    coherent = table.where(table.kind == "coherent")
    mean = coherent.logs.mean(0)
    centred = [coherent.logs[coherent.group == g] - coherent.logs[coherent.group == g].mean(0) for g in table.groups]
    scale = np.maximum(np.concatenate(centred).std(0), _LEAST_SCALE)
    z = _standard(table.logs, mean, scale).reshape(len(table.kind), -1)
    # Squares let what lies far from real text on either side count against a window, whatever kind of text it is.
    z = np.concatenate([z, z * z / 2], axis=1)
    chance = np.random.default_rng(seed)
    differences, counts = [], []
    for good, bad, count in _duels(table):
        left = np.repeat(good, _PAIRS)
        differences.append(z[left] - z[chance.choice(bad, size=len(left))])
        counts.append(np.full(len(left), count / len(left)))
    if not differences:
        raise InputError(f"There is no control to train on: the kinds are {', '.join(table.controls) or 'none'}.")
    x, weight = np.concatenate(differences), np.concatenate(counts)
    sign = np.where(np.arange(len(x)) % 2 == 0, 1.0, -1.0)  # a difference and its negative say the same
    regression = LogisticRegression(C=strength / len(x), fit_intercept=False, max_iter=1000)
    regression.fit(x * sign[:, None], sign, sample_weight=weight * len(x) / weight.sum())
    linear, squares = np.split(regression.coef_[0], 2)
    return Linear(mean, scale, linear.reshape(mean.shape), squares.reshape(mean.shape) / 2)


def _standard(logs: Floats, mean: Floats, scale: Floats) -> Floats:
    return np.clip((logs - mean) / scale, -LARGEST_Z, LARGEST_Z)


def _family(kind: str) -> str:
    return kind.partition("/")[0]


def _duels(table: Table) -> Iterator[tuple[Rows, Rows, float]]:
    """Coherent windows, controls that they are compared with, and what the comparison counts."""
    families = [_family(kind) for kind in table.controls]
    for group in table.groups:
        good = table.coherent(group)
        for kind in table.controls:
            count = COUNTS[_family(kind)] / families.count(_family(kind)) / len(table.groups)
            own = table.against(kind, group)
            foreign = np.setdiff1d(np.flatnonzero(table.kind == kind), own)
            if count and len(own):
                yield good, own, count
            if count and len(foreign):
                yield good, foreign, count / 2


def choose_heads(table: Table, count: int, strength: float) -> list[int]:
    """The columns of the `count` heads that weigh most in fits which each leave one group out."""
    chosen = np.arange(len(table.heads))
    while len(chosen) > count:
        some = table.take(chosen.tolist())
        parts = [some.where(some.group != group) for group in table.groups] if len(table.groups) > 2 else [some]
        importance = np.mean([fit_linear(part, strength).importance for part in parts], axis=0)
        left = max(count, int(len(chosen) * (1 - _DROPPED)))
        chosen = np.sort(chosen[np.argsort(-importance, kind="stable")[:left]])
    return [int(i) for i in chosen]


@dataclass(frozen=True, slots=True)
class Tested:
    """AUCs on windows that a fit has not seen, by (group, kind)."""

    auc: dict[tuple[str, str], float]
    resampled: dict[tuple[str, str], Floats]

    def mean(self) -> float:
        """The mean over groups, kinds counted as in training."""
        kinds = sorted({kind for _, kind in self.auc})
        families = [_family(kind) for kind in kinds]
        counts = {kind: COUNTS[_family(kind)] / families.count(_family(kind)) for kind in kinds}
        total = sum(counts[kind] for _, kind in self.auc)
        return sum(counts[kind] * auc for (_, kind), auc in self.auc.items()) / total

    def summary(self) -> dict[str, dict[str, list[float]]]:
        """By kind (generated kinds together) and group, and `mean` over groups: AUC, and its 95 % interval."""
        found: dict[str, dict[str, list[tuple[float, Floats]]]] = {}
        for (group, kind), auc in self.auc.items():
            name = "degenerate" if _family(kind) == "degenerate" else kind
            found.setdefault(name, {}).setdefault(group, []).append((auc, self.resampled[group, kind]))
        result: dict[str, dict[str, list[float]]] = {}
        for name, groups in found.items():
            means = {
                group: (np.mean([auc for auc, _ in some]), np.mean([draws for _, draws in some], axis=0))
                for group, some in groups.items()
            }
            means["mean"] = (np.mean([a for a, _ in means.values()]), np.mean([d for _, d in means.values()], axis=0))
            result[name] = {
                group: [round(value, 4) for value in asdict(Interval.of(float(auc), draws)).values()]
                for group, (auc, draws) in means.items()
            }
        return result


def held_out(table: Table, parts: Sequence[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]], **how: Any) -> Tested:
    """AUCs of several fits, each tested on windows that it was not fitted on.

    Args:
        parts: masks of the windows to fit on and of those to test on.
        how: `heads`, how many are chosen anew in each fit, and `strength`.
    """
    sums: dict[tuple[str, str], list[tuple[int, float, Floats]]] = {}
    for number, (seen, unseen) in enumerate(parts):
        train, test = table.where(seen), table.where(unseen)
        columns = choose_heads(train, how["heads"], how["strength"])
        scores = fit_linear(train.take(columns), how["strength"]).score(test.take(columns))
        for group in test.groups:
            good = test.coherent(group)
            for kind in test.controls:
                bad = test.against(kind, group)
                if not len(bad):
                    continue
                draws = resampled_aucs(
                    scores[good],
                    scores[bad],
                    test.doc_id[good].tolist(),
                    test.doc_id[bad].tolist(),
                    n=200,
                    seed=number,
                )
                auc = float(aucs(scores[good], scores[bad]))
                sums.setdefault((group, kind), []).append((len(good), auc, draws))
    mean = {key: np.average([a for _, a, _ in some], weights=[n for n, _, _ in some]) for key, some in sums.items()}
    spread = {
        key: np.average([d for _, _, d in some], axis=0, weights=[n for n, _, _ in some]) for key, some in sums.items()
    }
    return Tested({key: float(value) for key, value in mean.items()}, spread)


def by_documents(table: Table) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """Leave one fold of documents out."""
    return [(table.fold != fold, table.fold == fold) for fold in sorted({*table.fold.tolist()})]


def by_groups(table: Table) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """Leave one group out; controls that belong to no group are divided by folds."""
    first = min(table.fold.tolist())
    free = table.group == ""
    return [
        (np.where(free, table.fold != first, table.group != group), np.where(free, table.fold == first, own))
        for group in table.groups
        for own in [table.group == group]
    ]


def by_kinds(table: Table) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """Leave one kind of generated text out, and a fold of documents with it."""
    folds = sorted({*table.fold.tolist()})
    parts = []
    for i, kind in enumerate(kind for kind in table.controls if _family(kind) == "degenerate"):
        unseen = table.fold == folds[i % len(folds)]
        parts.append((~unseen & (table.kind != kind), (unseen & (table.kind == "coherent")) | (table.kind == kind)))
    return parts


def calibrate_signals(signals: Signals, options: CalibrateOptions, n_layers: int) -> Fit:
    """Make the fit of a calibration from measured windows.

    Args:
        signals: of coherent windows and controls, drawn in at least two folds.
        options: how many heads, how deep, at most.
        n_layers: layers of the whole model, of which `max_depth` is a share.

    Raises:
        UsageError: no global layer is that shallow; one fold only.
    """
    table = Table.of(signals)
    if len({*table.fold.tolist()}) < 2:
        raise UsageError("A calibration is tested on documents that it has not seen: use --folds of at least 2.")
    layers = sorted({layer for layer, _ in table.heads if (layer + 1) / n_layers <= options.max_depth + 1e-9})
    if not layers:
        first = (table.heads[0][0] + 1) / n_layers
        raise UsageError(f"The first layer that sees far is at {first:.2f} of the depth; raise --max-depth.")
    depths = sorted(
        {layers[round(len(layers) * share) - 1] for share in (0.5, 0.75, 1.0) if len(layers) * share >= 0.5}
    )
    tried = []
    for depth in depths:
        shallow = table.take([i for i, (layer, _) in enumerate(table.heads) if layer <= depth])
        for strength in STRENGTHS:
            some = shallow.take(choose_heads(shallow, options.heads, strength))
            how = {"heads": options.heads, "strength": strength}
            score = (
                held_out(some, by_documents(some), **how).mean() + held_out(some, by_groups(some), **how).mean()
            ) / 2
            log.info("layers to %d, strength %g: AUC %.4f", depth, strength, score)
            tried.append((score, depth, strength))
    best = max(score for score, _, _ in tried)
    shallowest = min(depth for score, depth, _ in tried if score >= best - AS_GOOD)
    _, depth, strength = max(each for each in tried if each[1] == shallowest)
    return _final(signals, table, depth, strength, options)


def _final(signals: Signals, table: Table, depth: int, strength: float, options: CalibrateOptions) -> Fit:
    shallow = table.take([i for i, (layer, _) in enumerate(table.heads) if layer <= depth])
    how = {"heads": options.heads, "strength": strength}
    some = shallow.take(choose_heads(shallow, options.heads, strength))
    linear = fit_linear(some, strength)
    features = tuple(
        Feature(
            layer,
            head,
            statistic,
            *(float(f"{x[i, j]:.6g}") for x in (linear.mean, linear.scale, linear.weight, linear.square)),
        )
        for i, (layer, head) in enumerate(some.heads)
        for j, statistic in enumerate(STATISTICS)
    )
    kinds = held_out(some, by_kinds(some), **how)
    left_out: dict[str, list[float]] = {}
    for (_, kind), auc in kinds.auc.items():
        if _family(kind) == "degenerate":
            left_out.setdefault(kind.partition("/")[2], []).append(auc)
    figures = {
        "windows": {kind: int((table.kind == kind).sum()) for kind in ("coherent", *table.controls)},
        "strength": strength,
        "unseen_documents": held_out(shallow, by_documents(shallow), **how).summary(),
        "unseen_groups": held_out(shallow, by_groups(shallow), **how).summary() if len(table.groups) > 2 else None,
        "unseen_kinds": {kind: round(float(np.mean(some)), 4) for kind, some in sorted(left_out.items())},
    }
    about: Mapping[str, Any] = signals.about
    return Fit(about["length"], about["span"], features, figures)


def calibrate(
    inputs: Sequence[str],
    out: Path | str,
    model: ModelOptions = ModelOptions(),
    controls: ControlOptions = ControlOptions(),
    options: CalibrateOptions = CalibrateOptions(),
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Draw windows of a corpus, make controls, measure every head, and write a calibration.

    A file that holds a calibration of the same model gets a further fit, or a new one for this window length. What is
    measured lies in a folder beside it (`FILE.signals-WINDOW`), from which an interrupted calibration goes on.

    Returns:
        The new fit's window, layers, heads and figures, and the file.

    Raises:
        OutputError: `out` is a calibration of another model (`overwrite` replaces it).
        InputError, ModelError, UsageError: as the steps do.
    """
    path = Path(out)
    meter = Meter(
        model,
        MeterOptions(
            method="calibrated",
            span=options.span,
            device=options.device,
            dtype=options.dtype,
            rope_theta=options.rope_theta,
        ),
    )
    assert isinstance(meter.calculator, FullModel)
    meter.check(controls.window)
    identity = meter.calculator.identity()
    others: tuple[Fit, ...] = ()
    if path.exists() and not overwrite:
        known = Calibration.read(path)
        if any(known.model[key] != identity[key] for key in ("fingerprint", "rope_theta")):
            raise OutputError(
                f"{path} is a calibration of '{known.model['name']}'. Choose another file, or --overwrite."
            )
        others = tuple(fit for fit in known.fits if fit.window != controls.window)
    samples = draw_samples(inputs, model, controls, options.folds)
    folder = path.with_name(f"{path.name}.signals-{controls.window}")
    signals = measure_samples(samples, meter, folder, overwrite=overwrite, quiet=quiet)
    fit = calibrate_signals(signals, options, len(meter.calculator.describe()["sliding_windows"]))
    Calibration(identity, tuple(sorted((*others, fit), key=lambda fit: fit.window))).write(path)
    return {
        "calibration": str(path),
        "model": identity["name"],
        "window": fit.window,
        "layers": sorted(fit.heads),
        "heads": sum(map(len, fit.heads.values())),
        **fit.figures,
    }


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a person wants to see of a result first."""

    def lines(table: Mapping[str, Any]) -> list[dict[str, Any]]:
        order = [kind for kind in (*PAIRED, "degenerate") if kind in table]
        kinds = [*order, *sorted(set(table) - set(order))]
        return [
            {"kind": kind} | {g: f"{v[0]:.3f} ({v[1]:.2f}–{v[2]:.2f})" for g, v in table[kind].items()}
            for kind in kinds
        ]

    tables = {"documents": lines(result["unseen_documents"])}
    if result["unseen_groups"]:
        tables["groups"] = lines(result["unseen_groups"])
    unseen = result["unseen_kinds"]
    return {
        **{key: result[key] for key in ("calibration", "model", "window", "layers", "heads")},
        "unseen kinds of text, mean": round(sum(unseen.values()) / len(unseen), 3) if unseen else None,
        **{f"AUC on unseen {what} (95 % interval)": {"": table} for what, table in tables.items()},
    }
