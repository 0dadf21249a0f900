"""The reference is the definition: here it is checked against loops written by hand from the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from longsift.attention import FarStatistics, far_statistics, reference, span_focus

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 7, 4, 2, 3
SCALE = 0.7


def queries_keys_values() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, HEADS, LENGTH, HEAD_DIM, generator=generator, dtype=torch.float64)
    k = torch.randn(1, KV_HEADS, LENGTH, HEAD_DIM, generator=generator, dtype=torch.float64)
    v = torch.randn(1, KV_HEADS, LENGTH, HEAD_DIM, generator=generator, dtype=torch.float64)
    return 2 * q, 2 * k, v


def logit_by_hand(head: int, n: int, m: int, softcap: float | None) -> float:
    q, k, _ = queries_keys_values()
    key_head = head // (HEADS // KV_HEADS)
    logit = SCALE * sum(float(q[0, head, n, i]) * float(k[0, key_head, m, i]) for i in range(HEAD_DIM))
    return logit if softcap is None else softcap * math.tanh(logit / softcap)


def probability_by_hand(head: int, n: int, m: int, visible: range, softcap: float | None) -> float:
    weights = {key: math.exp(logit_by_hand(head, n, key, softcap)) for key in visible}
    return weights[m] / sum(weights.values()) if m in weights else 0.0


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("distance", [0, 1, 3, LENGTH - 1, LENGTH])
def test_far_statistics_are_the_sum_and_variance_of_the_far_map(distance: int, softcap: float | None) -> None:
    q, k, _ = queries_keys_values()
    measured = far_statistics(q, k, distance, scale=SCALE, softcap=softcap, backend="reference")
    assert isinstance(measured, FarStatistics)
    for head in range(HEADS):
        far_map = [
            probability_by_hand(head, n, m, range(n + 1), softcap) if n - m >= distance else 0.0
            for n in range(LENGTH)
            for m in range(LENGTH)
        ]
        mean = sum(far_map) / len(far_map)
        variance = sum((p - mean) ** 2 for p in far_map) / (len(far_map) - 1)
        assert float(measured.strength[0, head]) == pytest.approx(sum(far_map) / LENGTH, rel=1e-12)
        assert float(measured.variance[0, head]) == pytest.approx(variance, rel=1e-10, abs=1e-18)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [1, 3, 4, LENGTH - 1, LENGTH, LENGTH + 2])
@pytest.mark.parametrize("distance", [0, 1, 3])
def test_far_keys_of_a_sliding_layer_are_those_between_the_distance_and_its_window(
    distance: int, window: int, softcap: float | None
) -> None:
    q, k, _ = queries_keys_values()
    options = {"scale": SCALE, "softcap": softcap, "sliding_window": window}
    measured = far_statistics(q, k, distance, backend="reference", **options)  # type: ignore[arg-type]
    for head in range(HEADS):
        far_map = [
            probability_by_hand(head, n, m, range(max(0, n - window + 1), n + 1), softcap)
            if distance <= n - m < window
            else 0.0
            for n in range(LENGTH)
            for m in range(LENGTH)
        ]
        mean = sum(far_map) / len(far_map)
        variance = sum((p - mean) ** 2 for p in far_map) / (len(far_map) - 1)
        assert float(measured.strength[0, head]) == pytest.approx(sum(far_map) / LENGTH, rel=1e-12)
        assert float(measured.variance[0, head]) == pytest.approx(variance, rel=1e-10, abs=1e-18)
        assert (float(measured.strength[0, head]) == 0) == (window <= distance)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("denominator", ["prior", "causal"])
@pytest.mark.parametrize("span", [1, 2, 3, LENGTH])
def test_span_focus_is_the_mass_between_spans_aligned_to_the_end(
    span: int, denominator: str, softcap: float | None
) -> None:
    q, k, _ = queries_keys_values()
    measured = span_focus(
        q,
        k,
        span,
        scale=SCALE,
        softcap=softcap,
        denominator=denominator,  # type: ignore[arg-type]
        backend="reference",
    )
    n_spans, lead = LENGTH // span, LENGTH % span
    assert measured.shape == (1, HEADS, n_spans, n_spans)
    for head in range(HEADS):
        for j in range(n_spans):
            rows = range(lead + j * span, lead + (j + 1) * span)
            for c in range(n_spans):
                keys = range(lead + c * span, lead + (c + 1) * span)
                by_hand = 0.0
                for n in rows:
                    visible = range(rows.start) if denominator == "prior" else range(n + 1)
                    by_hand += sum(probability_by_hand(head, n, m, visible, softcap) for m in keys)
                assert float(measured[0, head, j, c]) == pytest.approx(by_hand, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, LENGTH + 2])
def test_causal_attention_is_the_weighted_mean_of_the_visible_values(
    sliding_window: int | None, softcap: float | None
) -> None:
    q, k, v = queries_keys_values()
    out = reference.causal_attention(q, k, v, scale=SCALE, softcap=softcap, sliding_window=sliding_window)
    for head in range(HEADS):
        values = v[0, head // (HEADS // KV_HEADS)]
        for n in range(LENGTH):
            first = 0 if sliding_window is None else max(0, n - sliding_window + 1)
            visible = range(first, n + 1)
            by_hand = sum(probability_by_hand(head, n, m, visible, softcap) * values[m] for m in visible)
            torch.testing.assert_close(out[0, head, n], by_hand)
