"""LongAttn: what counts as far, what is written, and how it becomes a score."""

import pytest
import torch

from longsift.calculators import LayerAttention
from longsift.errors import UsageError
from longsift.methods import METHODS, build_method
from longsift.methods.longattn import LongAttn, far_distance
from longsift.selection import Term


class GivenLayer:
    """A first layer whose queries and keys are given; their heads come in as many shares as there are key heads."""

    device = torch.device("cpu")

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.q, self.k, self.kv_heads = q, k, k.shape[1]

    def shares(self, queries):
        return [range(i, i + 1) for i in range(self.k.shape[1])]

    def queries_keys(self, input_ids, *, rows, kv_heads):
        group = self.q.shape[1] // self.k.shape[1]
        q = self.q[: len(input_ids), kv_heads.start * group : kv_heads.stop * group]
        k = self.k[: len(input_ids), kv_heads.start : kv_heads.stop]
        return LayerAttention(layer=0, q=q if rows is None else q[:, :, rows], k=k, scale=self.q.shape[-1] ** -0.5)


def measure(method, q, k):
    return method.measure(GivenLayer(q, k), torch.zeros(len(q), q.shape[2], dtype=torch.long))


@pytest.mark.parametrize(("length", "distance"), [(32768, 8192), (1024, 256), (1000, 250), (777, 195), (4, 1)])
def test_far_begins_at_a_quarter_of_the_window(length, distance):
    assert far_distance(length) == distance


def test_a_window_has_the_mean_over_heads_of_strength_and_variance():
    torch.manual_seed(0)
    length, heads = 96, 4
    q, k = torch.randn(1, heads, length, 8) * 2, torch.randn(1, 2, length, 8) * 2
    measured = {name: values[0].tolist() for name, values in measure(LongAttn(detail=True), q, k).items()}

    logits = (q @ k.repeat_interleave(2, 1).transpose(2, 3)).double()[0] / 8**0.5
    map_ = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    far = map_.tril(-far_distance(length))
    assert measured["dependency_strength_heads"] == pytest.approx((far.sum((1, 2)) / length).tolist(), rel=1e-5)
    assert measured["variance_heads"] == pytest.approx(far.flatten(1).var(1).tolist(), rel=1e-5)
    assert measured["dependency_strength"] == pytest.approx(far.sum().item() / length / heads, rel=1e-5)
    assert measured["variance"] == pytest.approx(far.flatten(1).var(1).mean().item(), rel=1e-5)


def test_without_the_sink_the_first_128_tokens_are_never_far_and_stay_in_the_softmax():
    torch.manual_seed(0)
    length = 300
    q, k = torch.randn(1, 2, length, 8) * 2, torch.randn(1, 2, length, 8) * 2
    measured = {name: values.item() for name, values in measure(LongAttn(skip_sink=True), q, k).items()}
    logits = (q @ k.transpose(2, 3)).double()[0] / 8**0.5
    far = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    far = far.tril(-far_distance(length))
    far[:, :, :128] = 0
    assert measured["dependency_strength"] == pytest.approx(far.sum().item() / length / 2, rel=1e-5)
    assert measured["variance"] == pytest.approx(far.flatten(1).var(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("skip_sink", [False, True])
def test_the_shortest_window_is_the_first_with_a_far_pair(skip_sink):
    method = LongAttn(skip_sink=skip_sink)
    first = 128 if skip_sink else 0

    def far_pairs(length):
        return max(length - first - far_distance(length), 0)

    assert far_pairs(method.shortest())
    assert not far_pairs(method.shortest() - 1)


def test_strength_raises_the_score_and_variance_lowers_it():
    rule = LongAttn(alpha=0.25, normalize="minmax").rule()
    assert rule.terms == (Term("dependency_strength", 1.0), Term("variance", -0.25))
    assert rule.normalize == "minmax"


def test_an_unknown_method_is_answered_with_those_there_are():
    with pytest.raises(UsageError, match=", ".join(METHODS)):
        build_method("attention")


def test_an_unknown_normalization_is_refused():
    with pytest.raises(UsageError, match="zscore or minmax"):
        LongAttn(normalize="rank")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e308])
def test_a_weight_that_cannot_weigh_is_refused(alpha):
    with pytest.raises(UsageError, match="--alpha is a number"):
        LongAttn(alpha=alpha)
