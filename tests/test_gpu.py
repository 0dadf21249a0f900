"""On a GPU: the same definitions, the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import make_checkpoint
from longsift.attention import far_statistics, span_focus
from longsift.calculators.full import FullModel
from longsift.methods.calibrated import STATISTICS, Calibrated, Calibration, Feature, Fit
from longsift.scoring import Scorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [257, 1000])
def test_the_reductions_match_the_float64_reference(dtype, length):
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(2, heads, length, 64, generator=generator).to(dtype) for heads in (6, 2))
    far = far_statistics(q.cuda(), k.cuda(), length // 4)
    exact = far_statistics(q.double(), k.double(), length // 4, backend="reference")
    torch.testing.assert_close(far.strength.double().cpu(), exact.strength, rtol=1e-5, atol=0)
    torch.testing.assert_close(far.variance.double().cpu(), exact.variance, rtol=1e-5, atol=0)
    for denominator in ("prior", "causal"):
        focus = span_focus(q.cuda(), k.cuda(), 16, denominator=denominator)
        reference = span_focus(q.double(), k.double(), 16, denominator=denominator, backend="reference")
        # The kernels' exponential is right to a few units in the last place of its exponent, of some tens.
        torch.testing.assert_close(focus.double().cpu(), reference, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("method", ["longattn", "ladm"])
def test_a_score_on_the_gpu_is_the_score_on_the_cpu(method):
    ids = torch.randint(1, 8192, (4096,), generator=torch.Generator().manual_seed(0)).numpy()
    cpu, gpu = (Scorer(method, device=device, dtype="float32").measure(ids) for device in ("cpu", "cuda"))
    for name, value in cpu.items():
        assert gpu[name] == pytest.approx(value, rel=2e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_calibrated_score_on_the_gpu_is_the_score_on_the_cpu(family: str, tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "model", family, layers=4))
    # One head; and three that are not evenly spaced, two of which share keys
    pairs = [(layer, head) for layer, heads in ((1, [2]), (3, [0, 1]), (3, [3])) for head in heads]
    features = tuple(
        Feature(layer, head, statistic, mean=-2.0, scale=2.0, weight=1.0)
        for layer, head in pairs
        for statistic in STATISTICS
    )
    path = tmp_path / "calibration.json"
    Calibration(FullModel.load(folder).identity(), (Fit(700, 32, features),)).write(path)
    ids = torch.randint(160, (700,), generator=torch.Generator().manual_seed(0)).numpy()
    cpu, gpu = (
        Scorer(Calibrated(str(path)), model=folder, device=device, dtype="float32").measure(ids)
        for device in ("cpu", "cuda")
    )
    for name, value in cpu.items():
        assert gpu[name] == pytest.approx(value, rel=2e-3, abs=2e-3)


def test_the_checkpoint_type_is_used_on_a_gpu_and_gives_nearly_the_same():
    ids = torch.randint(1, 8192, (4096,), generator=torch.Generator().manual_seed(0)).numpy()
    scorer = Scorer("ladm", device="cuda")
    assert scorer.describe()["dtype"] == "bfloat16"
    assert scorer.measure(ids)["cds"] == pytest.approx(Scorer("ladm", device="cpu").measure(ids)["cds"], rel=0.1)
