"""A model on a CPU gives the same bits in any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.activations import ACT2FN

from longsift.calculators.steady import steady_activations
from longsift.scoring import Scorer


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_window_has_the_same_measures_in_any_number_of_threads(threads):
    ids = torch.randint(3, 2000, (2309,), generator=torch.Generator().manual_seed(0)).tolist()
    scorer = Scorer("ladm", model="embedded", device="cpu")
    measures = []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        measures.append(scorer.measure(ids))
    assert all(each == measures[0] for each in measures)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "sigmoid"])
def test_an_activation_is_that_of_one_thread(threads, name):
    network = torch.nn.Sequential(ACT2FN[name])
    x = torch.randn(2, 997, 131, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    expected = network(x)
    steady_activations(network)
    for number in (1, 3, 7):
        torch.set_num_threads(number)
        assert torch.equal(network(x), expected)
        assert torch.equal(network(x.transpose(0, 1)), expected.transpose(0, 1))
