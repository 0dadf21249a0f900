"""LADM's reduction against a literal transcription of its formulas, in plain loops over a materialised map."""

import math
import statistics

import pytest
import torch

from checkpoints import make_checkpoint
from longsift.calculators import LayerAttention
from longsift.calculators.full import FullModel
from longsift.errors import UsageError
from longsift.methods import build_method
from longsift.methods.ladm import Ladm
from longsift.selection import ScoreRule, Term


class OneLayer:
    """A calculator of one layer whose queries and keys are given."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.layer = LayerAttention(layer=0, q=q, k=k, scale=q.shape[-1] ** -0.5)

    def reduce(self, input_ids, reduction, and_attend=None):
        return {0: reduction(self.layer)}

    def each_window(self, input_ids, compute, key):
        return {name: column[None] for name, column in compute(input_ids).items()}

    def global_layers(self, length):
        return (0,)


def literal_cds(q, k, method: Ladm) -> float:
    """CDS as METHODS of the published code state it, one span pair after another."""
    heads, length, dim = q.shape[1:]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    span, interval, stride = method.span, method.span * method.d_afs, method.span * method.d_cds
    logits = (q[0] @ k[0].transpose(1, 2)).double() / math.sqrt(dim)
    scores = []
    s = length - span
    while s > span + 4 * interval:
        rows = logits[:, s : s + span]
        if method.denominator == "prior":
            mass = rows[:, :, :s].softmax(-1)
        else:
            future = torch.arange(length)[None, :] > torch.arange(s, s + span)[:, None]
            mass = rows.masked_fill(future, -torch.inf).softmax(-1)
        focus = mass.sum(1).mean(0)
        intervals = range(interval, s - span + 1, interval)
        pfs = [focus[s - i : s - i + span].sum().item() for i in intervals]
        if method.ablation == "no-len-weight":
            total = sum(pfs)
        else:
            total = sum(p * i / length for p, i in zip(pfs, intervals, strict=True)) * s / length
        scores.append(total if method.ablation == "no-std" else statistics.stdev(pfs) * total)
        s -= stride
    return sum(scores) / len(scores)


@pytest.mark.parametrize("length", [256, 250, 391])
@pytest.mark.parametrize("denominator", ["prior", "causal"])
@pytest.mark.parametrize("ablation", ["none", "no-std", "no-len-weight"])
@pytest.mark.parametrize("strides", [(4, 4), (2, 1), (1, 3)], ids=["4x4", "2x1", "1x3"])
def test_the_score_is_the_published_formula(length, denominator, ablation, strides):
    torch.manual_seed(length)
    q, k = torch.randn(1, 4, length, 8) * 2, torch.randn(1, 2, length, 8) * 2
    method = Ladm(span=8, d_afs=strides[0], d_cds=strides[1], ablation=ablation, denominator=denominator)
    measured = method.measure(OneLayer(q, k), torch.zeros(1, length, dtype=torch.long))
    assert measured["cds"].dtype == torch.float64
    assert measured["cds"].tolist() == [measured["cds_layers"].item()]
    assert measured["cds"].item() == pytest.approx(literal_cds(q, k, method), rel=1e-5)
    assert measured["layers"] == [0]


def test_windows_of_a_batch_are_measured_as_if_alone(tmp_path):
    calculator = FullModel.load(str(make_checkpoint(tmp_path, "gemma2", layers=4)))
    ids = torch.randint(160, (3, 250), generator=torch.Generator().manual_seed(0))
    method = Ladm(span=8, d_afs=2)
    together, alone = method.measure(calculator, ids), [method.measure(calculator, row[None]) for row in ids]
    assert together["layers"] == [1, 3]
    assert together["cds_layers"].shape == (3, 2)
    assert len(set(together["cds"].tolist())) == 3
    for name in ("cds", "cds_layers"):
        assert torch.equal(together[name], torch.cat([row[name] for row in alone]))


def test_dense_measures_every_pair_of_spans():
    assert Ladm(dense=True) == Ladm(d_afs=1, d_cds=1, dense=True)
    assert len(Ladm(span=8, dense=True).query_spans(256)) == 256 // 8 - 1 - 5


@pytest.mark.parametrize(
    "method", [Ladm(), Ladm(span=16, d_afs=2), Ladm(dense=True)], ids=["default", "small", "dense"]
)
def test_the_shortest_window_is_the_first_with_a_query_span(method):
    assert method.query_spans(method.shortest())
    assert not method.query_spans(method.shortest() - 1)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"span": 0}, "at least 1"),
        ({"ablation": "no-such"}, "--ablation takes"),
        ({"denominator": "future"}, "--denominator takes"),
        ({"layer_aggregation": "median"}, "--layer-aggregation takes mean or zscore"),
        ({"alpha": 0.5}, "--alpha does not apply to the method 'ladm'"),
        ({"skip_sink": True}, "--skip-sink does not apply .* The first span, the sink, is never a key span there"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_parameter_that_cannot_work_is_refused(parameters, message):
    with pytest.raises(UsageError, match=message):
        build_method("ladm", **parameters)


def test_layers_are_averaged_as_published_unless_asked_otherwise():
    assert Ladm().rule() == ScoreRule((Term("cds", 1.0),), "none")
    standardised = ScoreRule((Term("cds_layers", 1.0, each=True),), "zscore")
    assert Ladm(layer_aggregation="zscore").rule() == standardised
