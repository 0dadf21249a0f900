"""The calibrated method: its statistics, its score, what it computes, and what it refuses."""

from __future__ import annotations

import inspect
import json
import logging
import math
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from checkpoints import make_checkpoint
from longsift.attention.reference import span_focus
from longsift.calculators import LayerAttention
from longsift.calculators.full import FullModel
from longsift.errors import ModelError, UsageError
from longsift.methods import build_method, parameters_of
from longsift.methods.calibrated import (
    FORMAT,
    STATISTICS,
    Calibrated,
    Calibration,
    Feature,
    Fit,
    head_statistics,
)
from longsift.scoring import Scorer
from longsift.selection import Term

SPAN, LENGTH = 16, 16 * 15  # an odd number of spans
FEATURES = (
    Feature(0, 3, "far", math.log(0.4), 0.3, 1.2),
    Feature(2, 0, "weighted", math.log(0.3), 0.2, 0.7, -0.3),
    Feature(2, 0, "peak", math.log(0.1), 0.5, -0.4, 0.2),
    Feature(2, 2, "sink", math.log(0.1), 0.01, 0.5, 0.1),  # far out: clipped
)
FIT = Fit(LENGTH, SPAN, FEATURES, {"note": "made by hand"})

Ids = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of five global layers, of which the calibration looks at two."""
    return str(make_checkpoint(tmp_path_factory.mktemp("calculator"), "llama", layers=5))


@pytest.fixture(scope="module")
def calibration(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    Calibration(FullModel.load(folder).identity(), (FIT,)).write(path)
    return path


@pytest.fixture(scope="module")
def scorer(folder: str, calibration: Path) -> Scorer:
    return Scorer("calibrated", model=folder, calibration=str(calibration), device="cpu")


def window(seed: int = 0, length: int = LENGTH) -> Ids:
    return np.random.default_rng(seed).integers(3, 160, length)


def by_definition(p: npt.NDArray[np.float64]) -> dict[str, float]:
    """The statistics of one head as the docstring of `head_statistics` words them, loop by loop."""
    n = len(p)
    rows: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for j in range(n):
        far = [p[j, c] for c in range(1, j + 1) if j - c >= n / 4]
        if len(far) < 2:
            continue
        rows["far"].append(sum(far))
        rows["weighted"].append(sum(p[j, c] * (j - c) / n for c in range(1, j + 1)))
        rows["sink"].append(p[j, 0])
        rows["spread"].append(float(np.std(far, ddof=1)))
        rows["variation"].append(float(np.std(far, ddof=1) / np.mean(far)))
        rows["peak"].append(max(far))
        rows["near"].append(p[j, j])
    return {name: float(np.mean(values)) for name, values in rows.items() if values} | {
        "unsteady": float(np.std(rows["far"], ddof=1))
    }


class Watched:
    """A calculator that counts the heads of which something is kept, by layer."""

    def __init__(self, calculator: FullModel) -> None:
        self.calculator = calculator
        self.measured: dict[int, int] = {}

    def reduce(self, ids: torch.Tensor, reduction: Callable[..., torch.Tensor], layers: object) -> object:
        def counted(layer: LayerAttention) -> torch.Tensor:
            kept = reduction(layer)
            self.measured[layer.layer] = len(kept)
            return kept

        return self.calculator.reduce(ids, counted, layers=layers)

    def each_window(self, ids: torch.Tensor, compute: Callable[..., dict[str, torch.Tensor]], key: object) -> object:
        return self.calculator.each_window(ids, compute, key)


class TestHeadStatistics:
    @pytest.mark.parametrize("n_spans", [8, 9, 11, 15, 32, 33])
    def test_are_the_plain_definition(self, n_spans: int) -> None:
        chance = np.random.default_rng(n_spans)
        focus = np.tril(chance.exponential(size=(3, n_spans, n_spans)) ** 3)
        focus /= focus.sum(-1, keepdims=True)
        measured = head_statistics(torch.from_numpy(focus)).numpy()
        for head in range(3):
            expected = by_definition(focus[head])
            assert dict(zip(STATISTICS, measured[head], strict=True)) == pytest.approx(expected, rel=1e-12)

    def test_see_far_mass_and_no_sink(self) -> None:
        n = 16
        sink = torch.zeros(n, n)
        sink[:, 0] = 1
        far = torch.eye(n)
        far[8:] = 0
        far[8:, 1] = 1
        measured = head_statistics(torch.stack([sink, far]))
        some = {name: row.tolist() for name, row in zip(STATISTICS, measured.T, strict=True)}
        assert some["far"] == [0.0, 8 / 10]  # query spans 6 to 15 have two far spans
        assert some["sink"] == [1.0, 0.0]

    def test_need_eight_spans(self) -> None:
        with pytest.raises(ValueError, match="at least 8 spans; got 7"):
            head_statistics(torch.eye(7)[None])


class TestScore:
    def test_is_the_sum_over_features_of_the_plain_reference(self, scorer: Scorer, folder: str) -> None:
        ids = window()
        layers = FullModel.load(folder).reduce(torch.from_numpy(ids)[None], lambda layer: layer)
        statistics = {}
        for layer, attention in layers.items():
            q, k = attention.q.double(), attention.k.double()
            how = {"scale": attention.scale, "query_spans": range(LENGTH // SPAN), "denominator": "causal"}
            focus = span_focus(q, k, SPAN, **how)[0] / SPAN
            assert torch.allclose(focus.sum(-1), torch.ones(()).double())  # rows are probabilities
            statistics[layer] = [by_definition(head) for head in focus.numpy()]
        score = 0.0
        for each in FEATURES:
            z = (math.log(statistics[each.layer][each.head][each.statistic] + 1e-6) - each.mean) / each.scale
            z = max(-4.0, min(4.0, z))
            score += each.weight * z + each.square * z**2
        far = [statistics[layer][head]["far"] for layer, head in ((0, 3), (2, 0), (2, 2))]
        measured = scorer.measure(ids)
        assert measured["calibrated"] == pytest.approx(score, rel=1e-4)
        assert measured["far_focus"] == pytest.approx(sum(far) / 3, rel=1e-5)

    def test_measures_the_chosen_heads_only_and_stops_at_the_deepest(self, scorer: Scorer, folder: str) -> None:
        whole = Watched(FullModel.load(folder))  # all five layers, so that it could go on
        called: list[str] = []
        for name, module in whole.calculator._network.named_modules():
            module.register_forward_hook(lambda *_, name=name: called.append(name))
        measured = Calibrated.measure(scorer.method, whole, torch.from_numpy(window())[None])
        assert whole.measured == {0: 1, 2: 2}  # of 5 layers of 4 heads
        assert "layers.1.mlp" in called
        assert not [name for name in called if name.startswith(("layers.2.mlp", "layers.3", "layers.4", "norm"))]
        assert len(scorer.calculator._network.layers) == 3  # those behind are not even loaded
        assert {name: column.item() for name, column in measured.items()} == scorer.measure(window())

    def test_does_not_depend_on_what_is_scored_beside_it_or_before(self, scorer: Scorer) -> None:
        windows = [window(seed).tolist() for seed in range(3)]
        forward = scorer.score(windows)["calibrated"].to_pylist()
        backward = scorer.score(windows[::-1])["calibrated"].to_pylist()
        assert forward == backward[::-1]
        assert len(set(forward)) == 3

    def test_is_selected_as_it_is(self) -> None:
        rule = Calibrated(digest="known").rule()
        assert (rule.terms[0], rule.normalize) == (Term("calibrated", 1.0), "none")
        assert [term.weight for term in rule.terms[1:]] == [0]  # far_focus is for people
        assert rule.describe() == "calibrated"

    def test_a_window_that_is_too_short_fails_with_the_number_it_needs(self, scorer: Scorer) -> None:
        with pytest.raises(ModelError, match="shorter than the 128 tokens"):
            scorer.measure(window(length=127))
        assert math.isfinite(scorer.measure(window(length=128))["calibrated"])

    def test_a_window_of_another_length_warns_once_a_length(
        self, scorer: Scorer, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            scorer.measure(window())
            assert not caplog.records
            for _ in range(2):
                scorer.measure(window(length=LENGTH + 7))
        assert [record.getMessage() for record in caplog.records] == [
            "the calibration was made for windows of 240 tokens, not 247; see longsift calibrate"
        ]

    @pytest.mark.parametrize(("length", "chosen"), [(64, 128), (181, 128), (182, 256), (256, 256), (9_999, 1024)])
    def test_the_fit_is_the_one_of_the_nearest_length_in_proportion(self, length: int, chosen: int) -> None:
        fits = tuple(Fit(length, SPAN, FEATURES) for length in (128, 256, 1024))
        assert Calibration({}, fits).fit_for(length).window == chosen


class TestFile:
    def test_is_read_back_as_it_was_written(self, calibration: Path) -> None:
        read = Calibration.read(calibration)
        assert read.fits == (FIT,)
        assert read.model["fingerprint"]
        assert json.loads(calibration.read_text("utf-8"))["format"] == FORMAT

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            pytest.param(lambda text: text[: len(text) // 2], "is no calibration", id="cut off"),
            pytest.param(lambda text: "[]", "is no calibration", id="a list"),
            pytest.param(
                lambda text: text.replace(FORMAT, "longsift-calibration/9"), "longsift-calibration/9", id="new"
            ),
            pytest.param(lambda text: text.replace('"weight"', '"wait"'), "wait", id="a feature without weight"),
            pytest.param(lambda text: text.replace('"sink"', '"sunk"'), "unknown statistic", id="an unknown statistic"),
            pytest.param(lambda text: json.dumps(json.loads(text) | {"fits": []}), "is no calibration", id="no fit"),
        ],
    )
    def test_that_is_none_is_refused(
        self, change: Callable[[str], str], says: str, calibration: Path, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken.json"
        broken.write_text(change(calibration.read_text("utf-8")), "utf-8")
        with pytest.raises(UsageError, match=says) as error:
            Scorer("calibrated", calibration=str(broken))
        assert "longsift calibrate CORPUS --model M -o FILE" in str(error.value)

    def test_that_does_not_exist_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"none\.json.* Make one with longsift calibrate"):
            Calibrated(str(tmp_path / "none.json"))

    def test_that_changed_since_its_digest_was_taken_is_refused(self, calibration: Path, tmp_path: Path) -> None:
        path = shutil.copy(calibration, tmp_path / "c.json")
        method = Calibrated(str(path))
        path.write_text(path.read_text("utf-8").replace("made by hand", "edited by hand"), "utf-8")
        with pytest.raises(UsageError, match=r"has changed\. Score again with --overwrite"):
            method.loaded  # noqa: B018
        again = build_method("calibrated", **parameters_of(method))
        with pytest.raises(UsageError, match="has changed"):
            again.shortest()

    def test_that_is_gone_can_still_be_selected_by(self, calibration: Path, tmp_path: Path) -> None:
        path = shutil.copy(calibration, tmp_path / "c.json")
        parameters = parameters_of(Calibrated(str(path)))
        path.unlink()
        assert build_method("calibrated", **parameters).rule() == Calibrated(digest="known").rule()


class TestModel:
    def test_of_other_weights_is_refused_before_it_is_loaded(self, calibration: Path, tmp_path: Path) -> None:
        other = make_checkpoint(tmp_path / "other", "llama", layers=5, initializer_range=0.1)
        (other / "config.json").write_text("no longer a configuration")  # whoever loads it would fail
        with pytest.raises(UsageError, match="another set of weights") as error:
            Scorer("calibrated", model=str(other), calibration=str(calibration))
        for remedy in (f"longsift calibrate CORPUS --model {other} -o FILE", "--calibration FILE", "longattn or ladm"):
            assert remedy in str(error.value)

    def test_with_another_rope_base_is_refused(self, folder: str, calibration: Path) -> None:
        with pytest.raises(UsageError, match="another RoPE base"):
            Scorer("calibrated", model=folder, calibration=str(calibration), rope_theta=1e6)

    def test_without_a_calibration_of_its_own_is_refused(self, folder: str) -> None:
        with pytest.raises(UsageError, match="made with 'embedded'"):
            Scorer(model=folder)

    def test_may_lie_elsewhere(self, folder: str, calibration: Path, scorer: Scorer, tmp_path: Path) -> None:
        moved = shutil.copytree(folder, tmp_path / "moved")
        elsewhere = Scorer("calibrated", model=str(moved), calibration=str(calibration), device="cpu")
        assert elsewhere.measure(window()) == scorer.measure(window())


def test_layers_are_not_to_be_named_beside_a_calibration(folder: str, calibration: Path) -> None:
    with pytest.raises(UsageError, match="whose calibration names the layers"):
        Scorer("calibrated", model=folder, calibration=str(calibration), layers=[1])


class TestEmbedded:
    """The calibration that ships with the package."""

    @pytest.fixture(scope="class")
    def embedded(self) -> Scorer:
        return Scorer(device="cpu")

    def test_is_the_default(self, embedded: Scorer) -> None:
        assert embedded.method.name == "calibrated"
        assert embedded.describe()["model"] == "embedded"
        assert [fit.window for fit in embedded.method.loaded.fits] == [4096, 8192, 16384, 32768]

    def test_puts_texts_above_their_segments_exchanged(self, embedded: Scorer) -> None:
        texts = [Path(sysconfig.get_path("stdlib"), name).read_text("utf-8") for name in ("argparse.py", "typing.py")]
        windows = np.stack([embedded._cut(text, 4096)[0][1] for text in (*texts, inspect.getsource(inspect))])
        segments = windows.reshape(3, 8, 512)
        mixed = np.concatenate([segments[i % 3, i] for i in range(8)])
        scores = [embedded.measure(ids)["calibrated"] for ids in (*windows[:2], mixed)]
        assert min(scores[:2]) > scores[2] + 1
