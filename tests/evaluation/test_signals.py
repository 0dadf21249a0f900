"""What is measured for an evaluation is what the methods measure, and is measured once."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoints import make_checkpoint
from longsift.attention import span_focus
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.errors import ModelError, OutputError, UsageError
from longsift.evaluation.controls import Sample
from longsift.evaluation.signals import Meter, _main, draw_samples, measure_samples, read_signals
from longsift.methods.calibrated import STATISTICS, head_statistics
from longsift.methods.ladm import Ladm
from longsift.methods.longattn import LongAttn
from longsift.options import ControlOptions, MeterOptions, ModelOptions

SPAN, LENGTH = 16, 400
OPTIONS = MeterOptions(span=SPAN, device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="module")
def meter(checkpoint) -> Meter:
    return Meter(ModelOptions(model=checkpoint), OPTIONS)


def samples(count: int, length: int = LENGTH) -> list[Sample]:
    chance = np.random.default_rng(0)
    return [
        Sample("coherent", "book", f"d{i}", i % 2, chance.integers(0, 160, length).astype(np.int32))
        for i in range(count)
    ]


class TestMeasure:
    def test_agrees_with_ladm(self, meter):
        ids = samples(1)[0].input_ids
        values = meter.measure(ids)
        for name, method in (
            ("cds", Ladm(span=SPAN)),
            ("cds_dense", Ladm(span=SPAN, dense=True, denominator="causal")),
        ):
            expected = method.measure(meter.calculator, torch.from_numpy(ids)[None])
            assert values[name] == pytest.approx(expected["cds_layers"][0].numpy(), rel=1e-5)
            assert values["layers"].tolist() == expected["layers"]

    def test_agrees_with_longattn(self, meter, checkpoint):
        ids = samples(1)[0].input_ids
        windows = torch.from_numpy(ids.astype(np.int64))[None]
        columns = LongAttn(detail=True).measure(FirstLayer.load(checkpoint), windows)
        values = meter.measure(ids)
        assert values["strength"] == pytest.approx(columns["dependency_strength_heads"][0].numpy(), rel=1e-5)
        assert values["variance"] == pytest.approx(columns["variance_heads"][0].numpy(), rel=1e-4)

    def test_has_the_statistics_of_every_head(self, meter):
        ids = samples(1)[0].input_ids
        values = meter.measure(ids)
        assert values["heads"].shape == (3, 4, len(STATISTICS))

        def reduce(layer):
            focus = span_focus(layer.q, layer.k, SPAN, scale=layer.scale, denominator="causal")[0]
            return head_statistics(focus / SPAN)

        assert isinstance(meter.calculator, FullModel)
        for layer, expected in meter.calculator.reduce(torch.from_numpy(ids.astype(np.int64))[None], reduce).items():
            assert np.allclose(values["heads"][layer], expected.numpy(), rtol=1e-6)

    def test_longattn_alone_reads_the_first_layer_only(self, meter, checkpoint):
        alone = Meter(ModelOptions(model=checkpoint), replace(OPTIONS, method="longattn"))
        ids = samples(1)[0].input_ids
        values = alone.measure(ids)
        assert isinstance(alone.calculator, FirstLayer)
        assert set(values) == {"layers", "strength", "variance"}
        assert values["strength"] == pytest.approx(meter.measure(ids)["strength"], rel=1e-5)

    def test_of_a_hybrid_is_of_its_global_layers(self, tmp_path):
        model = ModelOptions(model=str(make_checkpoint(tmp_path / "hybrid", "gemma3", layers=6)))
        hybrid = Meter(model, replace(OPTIONS, method="ladm,calibrated"))
        hybrid.check(LENGTH)
        values = hybrid.measure(samples(1)[0].input_ids)
        assert values["layers"].tolist() == [2, 5]
        assert values["heads"].shape[0] == len(values["cds"]) == 2
        with pytest.raises(ModelError, match="that of this model sees only part"):
            Meter(model, replace(OPTIONS, method="longattn,ladm")).check(LENGTH)
        everything = Meter(model, OPTIONS)
        everything.check(LENGTH)
        assert everything.methods == ("ladm", "calibrated")
        assert "strength" not in everything.measure(samples(1)[0].input_ids)


@pytest.mark.parametrize(
    ("method", "length"), [("all", 288), ("calibrated", 8 * 16 - 1)], ids=["ladm", "head statistics"]
)
def test_windows_that_are_too_short_are_refused(checkpoint, method, length, tmp_path):
    meter = Meter(ModelOptions(model=checkpoint), replace(OPTIONS, method=method))
    with pytest.raises(UsageError, match="is shorter than"):
        measure_samples(samples(2, length), meter, tmp_path, quiet=True)


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="not 'luck'"):
        Meter(options=replace(OPTIONS, method="ladm,luck"))


class TestFolder:
    def test_gives_one_row_a_sample_in_order(self, meter, tmp_path):
        some = samples(4)
        signals = measure_samples(some, meter, tmp_path, quiet=True)
        assert signals.samples["doc_id"].tolist() == ["d0", "d1", "d2", "d3"]
        assert signals.samples["fold"].tolist() == [0, 1, 0, 1]
        assert signals.layers == (0, 1, 2)
        for i, sample in enumerate(some):
            for name, array in signals.values.items():
                assert np.allclose(array[i], meter.measure(sample.input_ids)[name], rtol=1e-6), name
        assert len(read_signals(tmp_path)) == 4

    def test_measures_only_what_is_not_there_yet(self, meter, tmp_path, monkeypatch):
        first = measure_samples(samples(3), meter, tmp_path, quiet=True)
        measured = []
        whole = meter.measure
        monkeypatch.setattr(meter, "measure", lambda ids: measured.append(ids) or whole(ids))
        both = measure_samples(samples(5), meter, tmp_path, quiet=True)
        assert len(measured) == 2
        assert np.array_equal(both.values["heads"][:3], first.values["heads"])

    def test_a_window_that_fails_names_itself_and_leaves_the_rest(self, meter, tmp_path):
        bad = replace(samples(1)[0], doc_id="odd", input_ids=np.full(LENGTH, 10**6, np.int32))
        with pytest.raises(ModelError, match=r"'odd' \(coherent\).*outside the model's vocabulary"):
            measure_samples([*samples(2), bad], meter, tmp_path, quiet=True)
        assert len(read_signals(tmp_path)) == 2

    def test_of_another_calculator_is_refused_until_overwritten(self, meter, checkpoint, tmp_path):
        measure_samples(samples(2), meter, tmp_path, quiet=True)
        other = Meter(ModelOptions(model=checkpoint), replace(OPTIONS, rope_theta=1234.0))
        with pytest.raises(OutputError, match="another model, length or span"):
            measure_samples(samples(2), other, tmp_path, quiet=True)
        again = measure_samples(samples(2), other, tmp_path, quiet=True, overwrite=True)
        assert len(again) == len(read_signals(tmp_path)) == 2

    def test_of_a_model_that_was_trained_on_is_refused(self, tmp_path):
        model = ModelOptions(model=str(make_checkpoint(tmp_path / "model", "llama")))
        measure_samples(samples(1), Meter(model, OPTIONS), tmp_path / "out", quiet=True)
        make_checkpoint(tmp_path / "model", "llama", initializer_range=0.3)
        with pytest.raises(OutputError, match="another model, length or span"):
            measure_samples(samples(1), Meter(model, OPTIONS), tmp_path / "out", quiet=True)

    def test_with_a_damaged_record_is_refused_until_overwritten(self, meter, tmp_path):
        measure_samples(samples(1), meter, tmp_path, quiet=True)
        (tmp_path / "signals.json").write_text("{")
        with pytest.raises(OutputError, match="Start again with --overwrite"):
            measure_samples(samples(1), meter, tmp_path, quiet=True)
        assert len(measure_samples(samples(1), meter, tmp_path, quiet=True, overwrite=True)) == 1

    def test_that_is_empty_is_no_signals(self, tmp_path):
        with pytest.raises(OutputError, match="holds no measures"):
            read_signals(tmp_path)


def test_the_command_draws_makes_controls_and_measures(model, corpus, tmp_path):
    arguments = [
        str(corpus),
        "--model",
        str(model),
        "--window",
        "400",
        "--segment",
        "50",
        "--span",
        "16",
        "--folds",
        "1",
    ]
    arguments += ["--kinds", "mixed,degenerate/uuids", "--per-kind", "2", "--device", "cpu", "-o", str(tmp_path)]
    _main(arguments)
    signals = read_signals(tmp_path)
    kinds = signals.samples["kind"].tolist()
    assert kinds.count("coherent") == kinds.count("mixed") == 11
    assert kinds.count("degenerate/uuids") == 2
    control = ControlOptions(window=400, segment=50, kinds="mixed,degenerate/uuids", per_kind=2)
    drawn = draw_samples([str(corpus)], ModelOptions(model=str(model)), control)
    assert {sample.key for sample in drawn} == set(signals.samples["key"].tolist())
    assert json.loads((tmp_path / "signals.json").read_text())["length"] == 400
