"""Evaluation: AUC of every score, layer and head, from measures to the page."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from longsift.errors import UsageError
from longsift.evaluation.auc import auc
from longsift.evaluation.evaluate import (
    MEAN,
    SCORES,
    calibrated_scores,
    compare,
    estimate,
    evaluate,
    read_evaluation,
    summary,
    user_scores,
)
from longsift.evaluation.page import write_page
from longsift.evaluation.signals import Meter, Signals
from longsift.methods.calibrated import STATISTICS, Calibrated, Calibration, Feature, Fit
from longsift.methods.ladm import Ladm
from longsift.methods.longattn import LongAttn
from longsift.options import ControlOptions, MeterOptions, ModelOptions
from longsift.scoring import Scorer

LAYERS, HEADS = (1, 3), 3
FAR = STATISTICS.index("far")


@pytest.fixture
def signals() -> Signals:
    """Two groups; head 2 of layer 3 sees coherence, its layer's CDS too, and nothing else sees anything."""
    chance = np.random.default_rng(0)
    kinds, groups, documents = [], [], []
    for group in ("book", "code"):
        for kind in ("coherent", "mixed"):
            kinds += [kind] * 30
            groups += [group] * 30
            documents += [f"{group}-{i}" for i in range(30)]
    for kind in ("degenerate/csv", "degenerate/hex"):
        kinds += [kind] * 5
        groups += [""] * 5
        documents += [f"{kind}/{i}" for i in range(5)]
    n = len(kinds)
    kind = np.array(kinds)
    values = {
        "heads": chance.uniform(0.1, 0.2, (n, 2, HEADS, len(STATISTICS))),
        "cds": chance.normal(size=(n, 2)) * [100.0, 1.0],
        "cds_dense": chance.normal(size=(n, 2)),
        "strength": chance.normal(size=(n, HEADS)),
        "variance": chance.normal(size=(n, HEADS)),
    }
    values["heads"][kind == "coherent", 1, 2, FAR] += 1
    values["cds"][kind == "coherent", 1] += 9
    samples = {
        "kind": kind,
        "group": np.array(groups),
        "doc_id": np.array(documents),
        "fold": np.zeros(n),
        "key": np.arange(n).astype(str),
    }
    return Signals(samples, LAYERS, values, {"span": 16})


def pick(rows: list[dict], **wanted) -> dict:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, found)
    return found[0]


class TestCompare:
    def test_finds_the_head_that_sees(self, signals):
        heads = compare(signals)["heads"]
        for group in ("book", "code", MEAN):
            best = max((r for r in heads if (r["kind"], r["group"]) == ("mixed", group)), key=lambda row: row["auc"])
            assert (best["layer"], best["head"], best["statistic"], best["auc"]) == (3, 2, "far", 1.0)

    def test_finds_the_layer_that_sees(self, signals):
        layers = compare(signals)["layers"]
        assert pick(layers, kind="mixed", group=MEAN, statistic="cds", layer=3)["auc"] == 1.0
        assert pick(layers, kind="mixed", group=MEAN, statistic="cds", layer=1)["high"] < 0.8

    def test_a_loud_layer_drowns_the_mean_but_not_the_z_scores(self, signals):
        scores = compare(signals)["scores"]
        assert pick(scores, score="ladm", kind="mixed", group=MEAN)["auc"] < 0.7
        assert pick(scores, score="ladm-zscore", kind="mixed", group=MEAN)["auc"] > 0.99

    def test_compares_generated_text_with_every_group(self, signals):
        scores = compare(signals)["scores"]
        values = user_scores(signals, np.flatnonzero(signals.samples["group"] == "code")[:30])["ladm-zscore"]
        kind, group = signals.samples["kind"], signals.samples["group"]
        coherent = (kind == "coherent") & (group == "code")
        row = pick(scores, score="ladm-zscore", kind="degenerate/hex", group="code")
        assert row["auc"] == pytest.approx(auc(values[coherent], values[kind == "degenerate/hex"]), abs=1e-4)
        whole = pick(scores, score="ladm-zscore", kind="degenerate", group="code")["auc"]
        parts = [pick(scores, score="ladm-zscore", kind=f"degenerate/{k}", group="code")["auc"] for k in ("csv", "hex")]
        assert whole == pytest.approx(np.mean(parts), abs=1e-4)

    def test_the_mean_is_of_groups_and_surer_than_each(self, signals):
        scores = compare(signals)["scores"]
        rows = [pick(scores, score="longattn", kind="mixed", group=group) for group in ("book", "code", MEAN)]
        assert rows[2]["auc"] == pytest.approx((rows[0]["auc"] + rows[1]["auc"]) / 2, abs=1e-4)
        assert rows[2]["high"] - rows[2]["low"] < min(row["high"] - row["low"] for row in rows[:2])
        assert all(row["low"] <= row["auc"] <= row["high"] for row in rows)

    def test_leaves_out_what_was_not_measured(self, signals):
        some = Signals(signals.samples, LAYERS, {"strength": signals.values["strength"]}, signals.about)
        some.values["variance"] = signals.values["variance"]
        result = compare(some)
        assert {row["score"] for row in result["scores"]} == {"longattn", "longattn-strength"}
        assert result["layers"] == []
        assert {row["statistic"] for row in result["heads"]} == {"strength", "variance"}

    def test_a_column_that_does_not_vary_is_blind_and_harms_no_other(self, signals):
        signals.values["cds"][:, 0] = 0.25
        scores = compare(signals)["scores"]
        assert pick(scores, score="ladm-zscore", kind="mixed", group=MEAN)["auc"] == 1.0


def make_fit(span: int = 16, layer: int = 1) -> Fit:
    features = (
        Feature(layer, 0, "far", math.log(0.1), 0.5, 1.5, -0.25),
        Feature(layer, 2, "sink", math.log(0.2), 0.7, -0.8),
        Feature(layer, 2, "unsteady", math.log(0.01), 0.01, 0.3, 0.1),  # far out: clipped
    )
    return Fit(400, span, features)


class TestCalibrated:
    def test_is_the_score_of_the_method(self, model, tmp_path):
        meter = Meter(ModelOptions(model=str(model)), MeterOptions(method="calibrated", span=16, device="cpu"))
        path = tmp_path / "calibration.json"
        Calibration(meter.calculator.identity(), (make_fit(),)).write(path)
        windows = np.random.default_rng(0).integers(0, 500, (3, 400)).astype(np.int32)
        values = [meter.measure(ids) for ids in windows]
        heads = np.stack([value["heads"] for value in values])
        signals = Signals({"key": np.arange(3)}, (0, 1, 2), {"heads": heads}, {"span": 16})
        method = Calibrated(str(path))
        with torch.inference_mode():
            expected = method.measure(meter.calculator, torch.from_numpy(windows))["calibrated"].numpy()
        assert calibrated_scores(signals, make_fit()) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize(("fit", "message"), [(make_fit(span=32), "--span 32"), (make_fit(layer=2), r"\[2\]")])
    def test_that_does_not_fit_the_measures_is_refused(self, signals, fit, message):
        with pytest.raises(UsageError, match=message):
            calibrated_scores(signals, fit)


CONTROL = ControlOptions(window=400, segment=50, kinds="mixed,far-half,degenerate/uuids,degenerate/csv", per_kind=3)


class TestEvaluate:
    @pytest.fixture(scope="class")
    def done(self, model, corpus, tmp_path_factory):
        out = tmp_path_factory.mktemp("evaluation")
        meter = MeterOptions(span=16, device="cpu")
        path = out / "calibration.json"
        identity = Meter(
            ModelOptions(model=str(model)), MeterOptions(method="calibrated", span=16)
        ).calculator.identity()
        Calibration(identity, (make_fit(),)).write(path)
        options = (ModelOptions(model=str(model)), CONTROL, meter)
        return out, evaluate([str(corpus)], out, *options, calibration=str(path), quiet=True)

    def test_gives_every_score_by_kind_and_group(self, done):
        _, result = done
        kinds = {"mixed", "far-half", "degenerate", "degenerate/uuids", "degenerate/csv"}
        places = {(row["score"], row["kind"], row["group"]) for row in result["scores"]}
        assert places == {(s, k, g) for s in SCORES for k in kinds for g in ("code", "mixed", MEAN)}
        assert result["windows"]["coherent"] == {"code": 6, "mixed": 5}

    def test_writes_the_result_the_heads_and_a_page(self, done):
        out, result = done
        assert read_evaluation(out) == json.loads(json.dumps(result))
        heads = pq.read_table(out / "heads.parquet").to_pylist()
        assert {row["group"] for row in heads} == {"code", "mixed", MEAN}
        assert len([r for r in heads if r["statistic"] == "far" and r["kind"] == "mixed"]) == 3 * 3 * 4
        page = (out / "evaluation.html").read_text("utf-8")
        assert "<script" not in page
        assert "http" not in page.replace("http-equiv", "")
        for word in (*SCORES, "far-half", "uuids", "mean of groups", "layer 2, head 3:"):
            assert word in page, word
        mean = pick(result["scores"], score="ladm", kind="mixed", group=MEAN)
        assert f"{mean['auc']:.3f}<small>{mean['low']:.2f}–{mean['high']:.2f}</small>" in page

    def test_the_page_shows_names_of_a_corpus_as_text(self, done, tmp_path):
        _, result = done
        odd = json.loads(json.dumps(result).replace('"code"', '"<script>x"'))
        write_page(odd, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text("utf-8")
        assert "<script" not in page
        assert "<bdi>&lt;script&gt;x</bdi>" in page

    def test_scores_are_those_of_the_scorer(self, done, model, corpus):
        from longsift.evaluation.signals import draw_samples, read_signals

        out, _ = done
        samples = draw_samples([str(corpus)], ModelOptions(model=str(model)), CONTROL)[:3]
        signals = read_signals(out, [sample.key for sample in samples])
        values = user_scores(signals, np.arange(3))
        for method, column, score in (
            (LongAttn(), "dependency_strength", "longattn-strength"),
            (Ladm(span=16), "cds", "ladm"),
            (Ladm(span=16, dense=True, denominator="causal"), "cds", "ladm-dense"),
        ):
            scorer = Scorer(method, model=str(model), device="cpu")
            expected = [scorer.measure(sample.input_ids)[column] for sample in samples]
            assert values[score] == pytest.approx(expected, rel=1e-5), score

    def test_summary_is_a_table_of_scores_by_kind(self, done):
        _, result = done
        table = summary(result)["AUC, mean of groups (95 % interval)"][""]
        assert [row["score"] for row in table] == list(SCORES)
        assert set(table[0]) == {"score", "mixed", "far-half", "degenerate"}

    def test_a_calibration_of_another_model_is_refused(self, done, corpus, tmp_path, checkpoint_of_another_shape):
        out, _ = done
        with pytest.raises(UsageError, match="another set of weights"):
            evaluate(
                [str(corpus)],
                tmp_path,
                ModelOptions(model=checkpoint_of_another_shape),
                CONTROL,
                MeterOptions(span=16, device="cpu"),
                calibration=str(out / "calibration.json"),
            )

    def test_an_estimate_counts_and_measures_nothing_else(self, model, corpus):
        plan = estimate([str(corpus)], ModelOptions(model=str(model)), CONTROL, MeterOptions(span=16, device="cpu"))
        assert (plan["coherent"], plan["controls"], plan["tokens"]) == (11, 28, 39 * 400)
        assert plan["seconds"] > 0


@pytest.fixture(scope="module")
def checkpoint_of_another_shape(tmp_path_factory) -> str:
    from checkpoints import make_checkpoint

    return str(make_checkpoint(tmp_path_factory.mktemp("other"), "qwen2"))
