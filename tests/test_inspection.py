"""One document under the lens: the numbers are the specification's, and any source of a window gives a page."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from checkpoints import make_checkpoint
from longsift.attention import span_focus
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.errors import ModelError, UsageError
from longsift.inspection import maps
from longsift.inspection.maps import dependency_map, dequantise, pooled, quantise
from longsift.methods.longattn import LongAttn


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> FullModel:
    """Three layers of four heads that share two key heads, in float64."""
    folder = make_checkpoint(tmp_path_factory.mktemp("exact") / "llama", "llama")
    return FullModel.load(str(folder), dtype=torch.float64)


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(160, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("denominator", ["causal", "prior"])
@pytest.mark.parametrize(("length", "span"), [(331, 16), (97, 48), (256, 32)])
def test_the_map_is_the_mass_between_spans_of_the_specification(exact, length, span, denominator):
    ids = ids_of(length)
    found = dependency_map(exact, ids, span=span, denominator=denominator, heads=[1])
    expected = exact.reduce(
        ids[None],
        lambda layer: span_focus(
            layer.q, layer.k, span, scale=layer.scale, denominator=denominator, backend="reference"
        ),
    )
    assert found.shares.shape == (3, length // span, length // span)
    for layer in range(3):
        pfs = expected[layer][0].numpy() / span
        np.testing.assert_allclose(found.shares[layer], pfs.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.heads[1], expected[1][0].numpy() / span, rtol=1e-6, atol=1e-9)
    assert list(found.heads) == [1]
    assert not np.triu(found.shares, 1).any()


def test_shares_of_all_attention_add_up_to_it(exact):
    found = dependency_map(exact, ids_of(320), span=32)
    np.testing.assert_allclose(found.shares.sum(-1), 1, rtol=1e-6)
    assert found.starts().tolist() == list(range(0, 320, 32))


def test_spans_end_with_the_window(exact):
    assert dependency_map(exact, ids_of(100), span=32).starts().tolist() == [4, 36, 68]


def test_the_mean_of_the_far_curve_is_longattns_strength(exact, tmp_path):
    folder = make_checkpoint(tmp_path / "llama", "llama")
    first = FirstLayer.load(str(folder), dtype=torch.float64)
    for length in (1023, 77):
        ids = ids_of(length)
        curve = dependency_map(exact, ids, span=16, layers=[2], curve=True).curve
        strength = LongAttn().measure(first, ids[None])["dependency_strength"].item()
        counts = np.diff([*(np.arange(len(curve.mass)) * length // len(curve.mass)), length])
        assert len(curve.mass) == min(length, maps.POINTS)
        assert curve.strength == pytest.approx(strength, rel=1e-6)
        assert np.average(curve.mass, weights=counts) == pytest.approx(strength, rel=1e-6)
        assert np.average(curve.positions, weights=counts) == pytest.approx((length - 1) / 2)
        assert not curve.mass[curve.positions < curve.distance - 2].any()


def test_a_first_layer_alone_has_the_map_of_that_layer(exact, tmp_path):
    first = FirstLayer.load(str(make_checkpoint(tmp_path / "llama", "llama")), dtype=torch.float64)
    ids = ids_of(200)
    alone, whole = dependency_map(first, ids, span=16, curve=True), dependency_map(exact, ids, span=16, curve=True)
    np.testing.assert_allclose(alone.shares[0], whole.shares[0], rtol=1e-6)
    np.testing.assert_allclose(alone.curve.mass, whole.curve.mass, rtol=1e-6)
    with pytest.raises(ModelError, match="only layer 0"):
        dependency_map(first, ids, layers=[1], span=16)


def test_a_first_layer_that_slides_has_no_far_curve(tmp_path):
    gemma = FullModel.load(str(make_checkpoint(tmp_path / "gemma", "gemma3")))
    found = dependency_map(gemma, ids_of(300), span=16, curve=True)
    assert found.curve is None
    assert 0 not in found.layers


def test_a_span_that_does_not_fit_names_one_that_does(exact):
    with pytest.raises(UsageError, match="--span 12 or less"):
        dependency_map(exact, ids_of(200), span=128)


def test_a_coarse_map_is_that_of_longer_spans(exact):
    ids = ids_of(384)
    fine, longer = dependency_map(exact, ids, span=16), dependency_map(exact, ids, span=64)
    np.testing.assert_allclose(pooled(fine.mean(), 4), longer.mean(), rtol=1e-5)
    assert fine.coarse(6).shape == (6, 6)
    np.testing.assert_allclose(dequantise(fine.coarse(6)), longer.mean(), rtol=0.024)
    assert pooled(fine.mean(), 5).sum(-1) == pytest.approx(np.ones(5), rel=1e-5)
    assert fine.coarse(64).shape == (24, 24)


def test_a_byte_keeps_a_share_to_two_percent():
    shares = np.array([0, 0.9e-5, 1e-5, 0.0123, 0.5, 1], dtype=np.float32)
    back = dequantise(quantise(shares))
    assert back[:2].tolist() == [0, 0]
    np.testing.assert_allclose(back[2:], shares[2:], rtol=0.024)
