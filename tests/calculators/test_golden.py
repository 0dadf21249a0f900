"""The calculators with the reductions, against what the published code of the two papers gave (float32)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longsift.attention import far_statistics, span_focus
from longsift.calculators import LayerAttention
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = [
    (folder.name, kind, case)
    for folder in sorted(GOLDEN.iterdir())
    for kind, cases in json.loads((folder / "expected.json").read_text()).items()
    for case in cases
]


def cases(kind: str) -> Any:
    return pytest.mark.parametrize(
        ("model", "case"),
        [pytest.param(model, case, id=f"{model}-{case['key']}") for model, k, case in CASES if k == kind],
    )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs) / theirs).abs().max())


@cases("longattn")
def test_far_statistics_of_the_first_layer_are_those_of_longattn(model: str, case: dict[str, Any]) -> None:
    expected = load_file(GOLDEN / model / "expected.safetensors")
    layer = FirstLayer.load(str(GOLDEN / model), rope_theta=case["rope_theta"]).queries_keys(
        expected[f"input_ids.L{case['L']}"]
    )
    ours = far_statistics(layer.q, layer.k, case["k"], scale=layer.scale)
    assert relative_error(ours.strength, expected[case["key"] + ".dependency_strength"]) <= 1e-5
    assert relative_error(ours.variance, expected[case["key"] + ".variance"]) <= 1e-5


def contextual_dependency(focus: torch.Tensor, starts: list[int], case: dict[str, Any]) -> torch.Tensor:
    """CDS of each window from (batch, query spans, spans), written after the formulas of the paper."""
    length, span, interval = case["L"], case["span"], case["span"] * case["d_afs"]
    scores = []
    for row, start in enumerate(starts):
        back = torch.arange(interval, start - span + 1, interval)
        pairwise = focus[:, row, (start - length % span - back) // span]
        weights = back / length * (start / length)
        if case["ablation"] == "no_len_weight":
            weights = torch.ones(len(back), dtype=focus.dtype)
        spread = 1.0 if case["ablation"] == "no_std" else pairwise.std(-1)
        scores.append(spread * (pairwise * weights).sum(-1))
    return torch.stack(scores).mean(0)


@cache
def load_full(model: str) -> FullModel:
    return FullModel.load(str(GOLDEN / model))


@cases("ladm")
def test_span_focus_of_every_layer_gives_the_scores_of_ladm(model: str, case: dict[str, Any]) -> None:
    expected = load_file(GOLDEN / model / "expected.safetensors")
    length, span = case["L"], case["span"]
    first = span + 4 * span * case["d_afs"]
    starts = list(range(length - span, first, -span * case["d_cds"]))

    def reduce(layer: LayerAttention) -> torch.Tensor:
        spans = [(start - length % span) // span for start in starts]
        focus = span_focus(layer.q, layer.k, span, scale=layer.scale, query_spans=spans, average_heads=True)
        return contextual_dependency(focus.double(), starts, case)

    layers = load_full(model).reduce(expected[f"input_ids.L{length}"], reduce)
    assert relative_error(torch.stack(list(layers.values())), expected[case["key"]]) <= 1e-5
