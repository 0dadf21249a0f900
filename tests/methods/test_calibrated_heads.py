"""The chosen heads are measured together, and each as if it were alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from checkpoints import make_checkpoint
from longsift.attention import span_focus
from longsift.calculators import LayerAttention
from longsift.calculators.full import FullModel
from longsift.methods.calibrated import (
    LARGEST_Z,
    SMALLEST,
    STATISTICS,
    Calibrated,
    Calibration,
    Feature,
    Fit,
    head_keys,
    head_statistics,
)

SPAN = 16

HEADS = [
    pytest.param([0], True, id="first"),
    pytest.param([11], True, id="last"),
    pytest.param([3, 4], True, id="two-of-one-key-head-and-of-two"),
    pytest.param([4, 5], True, id="two-of-one-key-head"),
    pytest.param([1, 5, 9], True, id="evenly-spaced"),
    pytest.param([2, 3, 7, 11], False, id="scattered"),
    pytest.param(list(range(12)), True, id="all"),
]


def queries_and_keys(length: int = 200) -> LayerAttention:
    generator = torch.Generator().manual_seed(0)
    # (batch, length, heads, head_dim) seen through, as a projection leaves them
    q, k = (torch.randn(1, length, n, 8, generator=generator).transpose(1, 2) for n in (12, 3))
    return LayerAttention(0, q, k, 0.3)


@pytest.mark.parametrize(("heads", "view"), HEADS)
def test_chosen_heads_come_with_the_keys_that_they_use(heads: list[int], view: bool) -> None:
    layer = queries_and_keys()
    q, k = head_keys(layer, heads)
    assert torch.equal(q, layer.q[:, heads])
    group = len(heads) // k.shape[1]
    assert torch.equal(k.repeat_interleave(group, 1), layer.k[:, [head // 4 for head in heads]])
    assert (q.untyped_storage().data_ptr() == layer.q.untyped_storage().data_ptr()) == view


@pytest.mark.parametrize("heads", [param.values[0] for param in HEADS[:-1]], ids=[param.id for param in HEADS[:-1]])
def test_views_of_heads_are_measured_to_the_same_bits_as_copies(heads: list[int]) -> None:
    layer = queries_and_keys()
    q, k = head_keys(layer, heads)
    copies = layer.q[:, heads].contiguous(), layer.k[:, [head // 4 for head in heads]].contiguous()
    assert torch.equal(span_focus(q, k, SPAN, denominator="causal"), span_focus(*copies, SPAN, denominator="causal"))


@pytest.mark.parametrize("n_spans", [8, 13, 64, 256])
def test_a_head_has_the_same_statistics_among_others(n_spans: int) -> None:
    generator = torch.Generator().manual_seed(n_spans)
    focus = torch.rand(16, n_spans, n_spans, generator=generator).tril()
    focus /= focus.sum(-1, keepdim=True)
    together = head_statistics(focus)
    by_layer = [head_statistics(part) for part in focus.split([2, 5, 9])]
    assert torch.equal(together, torch.cat(by_layer))
    # PyTorch takes a single standard deviation in another order.
    torch.testing.assert_close(head_statistics(focus[3:4]), together[3:4], rtol=1e-14, atol=0)


def test_the_score_is_what_its_layers_give_one_by_one(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "model", "qwen3", layers=4))
    calculator = FullModel.load(folder)
    pairs = [(0, 1), (0, 3), (2, 0), (2, 1), (2, 3), (3, 1), (3, 2)]
    features = tuple(
        Feature(layer, head, statistic, mean=-2.0 - i, scale=0.7, weight=0.3 * i - 1.0, square=0.1)
        for i, (layer, head) in enumerate(pairs)
        for statistic in STATISTICS
    )
    path = tmp_path / "calibration.json"
    Calibration(calculator.identity(), (Fit(210, SPAN, features),)).write(path)
    ids = torch.randint(160, (210,), generator=torch.Generator().manual_seed(1))
    method = Calibrated(str(path))
    with torch.inference_mode():
        measured = method.measure(calculator, ids[None])
        beside = method.measure(calculator, torch.stack([ids.flip(0), ids]))
    assert all(torch.equal(column[1:], measured[name]) for name, column in beside.items())

    def statistics(layer: LayerAttention) -> torch.Tensor:
        chosen = [head for of, head in pairs if of == layer.layer]
        q, k = layer.q[:, chosen], layer.k[:, [head // 2 for head in chosen]]
        focus = span_focus(q, k, SPAN, scale=layer.scale, denominator="causal")
        return head_statistics(focus[0] / SPAN)

    rows = torch.cat([*calculator.reduce(ids[None], statistics, layers=(0, 2, 3)).values()]).tolist()
    score = 0.0
    for feature in features:
        value = rows[pairs.index((feature.layer, feature.head))][STATISTICS.index(feature.statistic)]
        z = max(-LARGEST_Z, min(LARGEST_Z, (math.log(value + SMALLEST) - feature.mean) / feature.scale))
        score += feature.weight * z + feature.square * z * z
    assert {name: (column.dtype, column.shape) for name, column in measured.items()} == dict.fromkeys(
        ("calibrated", "far_focus"), (torch.float64, (1,))
    )
    assert measured["calibrated"].item() == pytest.approx(score, rel=1e-13)
    assert measured["far_focus"].item() == pytest.approx(sum(row[0] for row in rows) / len(rows), rel=1e-13)
