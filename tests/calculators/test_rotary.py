"""The look-up kernel writes rows of the table turned to their positions: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernel is imported

pytest.importorskip("triton")
pytestmark = [pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"), *([pytest.mark.gpu] * ON_GPU)]

from longsift.calculators.positions import Turns  # noqa: E402
from longsift.calculators.rotary import look_up  # noqa: E402

VOCABULARY = 50


@pytest.fixture(autouse=True)
def _new_memory_holds_nan() -> Iterator[None]:
    """So that an entry that no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the filling is what is wanted of it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_table(heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(VOCABULARY, heads, head_dim, generator=generator).to(DEVICE, dtype)


def make_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)


def make_turns(length: int, pairs: int, dtype: torch.dtype = torch.float32, factor: float = 1.2) -> Turns:
    angles = torch.arange(length, device=DEVICE)[:, None] * torch.logspace(0, -4, pairs, device=DEVICE)
    return Turns((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


def plainly(table: torch.Tensor, ids: torch.Tensor, turns: Turns | None) -> torch.Tensor:
    """The same by indexing and complex numbers, in float64."""
    found = table.double()[ids].transpose(1, 2)  # (batch, heads, length, head_dim)
    if turns is None:
        return found
    pairs = turns.cos.shape[1]
    turned = torch.complex(found[..., :pairs], found[..., pairs : 2 * pairs])
    turned = turned * torch.complex(turns.cos.double(), turns.sin.double())
    return torch.cat([turned.real, turned.imag, found[..., 2 * pairs :]], -1)


@pytest.mark.parametrize(
    ("heads", "head_dim", "pairs", "length"),
    [
        pytest.param(3, 16, 8, 77, id="whole-heads"),
        pytest.param(2, 60, 30, 33, id="d60"),
        pytest.param(2, 24, 5, 40, id="part-of-a-head"),
        pytest.param(1, 20, None, 31, id="no-positions"),
        pytest.param(1, 2, 1, 1, id="one-token"),
    ],
)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        pytest.param(torch.float16, id="float16"),
        pytest.param(
            torch.bfloat16,
            id="bfloat16",
            marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter cuts bits off where it should round"),
        ),
    ],
)
def test_rows_are_those_of_the_table_turned_and_rounded_once(
    heads: int, head_dim: int, pairs: int | None, length: int, dtype: torch.dtype
) -> None:
    table, ids = make_table(heads, head_dim, dtype), make_ids(2, length)
    turns = None if pairs is None else make_turns(length, pairs, dtype)
    found, exact = look_up(table, ids, turns), plainly(table, ids, turns)
    assert found.dtype == dtype
    assert found.is_contiguous()
    # Half an ulp for the one rounding, and float32's on the way.
    atol = 0.0 if pairs is None else 4e-7 * float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0.5001 * torch.finfo(dtype).eps, atol=atol)


def test_some_rows_and_some_heads_are_the_same_bits_as_among_all() -> None:
    table, ids, turns = make_table(4, 16), make_ids(3, 90), make_turns(90, 6)
    whole = look_up(table, ids, turns)
    rows = torch.tensor([0, 3, 4, 50, 88, 89], device=DEVICE)
    assert torch.equal(look_up(table[:, 1:3], ids, turns, rows), whole[:, 1:3][:, :, rows])


def test_a_window_is_the_same_bits_alone_and_among_others() -> None:
    table, ids, turns = make_table(2, 16), make_ids(3, 45), make_turns(45, 8)
    assert torch.equal(look_up(table, ids[1:2], turns)[0], look_up(table, ids, turns)[1])


def test_ids_that_lie_apart_in_memory_are_read_as_they_are() -> None:
    table, ids, turns = make_table(2, 16), make_ids(2, 45), make_turns(20, 8)
    assert torch.equal(look_up(table, ids[:, 10:30], turns), look_up(table, ids[:, 10:30].contiguous(), turns))


@pytest.mark.parametrize("foreign", [-1, VOCABULARY, 2**40])
def test_a_foreign_id_gives_nan_and_reads_nothing(foreign: int) -> None:
    table, ids = make_table(2, 16), make_ids(1, 20)
    ids[0, 7] = foreign
    found = look_up(table, ids, make_turns(20, 6))
    assert found[:, :, 7].isnan().all()
    assert found[:, :, :7].isfinite().all()
    assert found[:, :, 8:].isfinite().all()


def test_a_row_outside_the_window_gives_nan() -> None:
    table, ids = make_table(1, 16), make_ids(1, 20)
    found = look_up(table, ids, make_turns(20, 8), torch.tensor([2, 20], device=DEVICE))
    assert found[:, :, 0].isfinite().all()
    assert found[:, :, 1].isnan().all()
