"""A Triton kernel that does nothing but exponentials, to measure how many of them a GPU makes in a second."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, STEPS = 1024, 1024


@triton.jit
def _exponentials_kernel(p_values, p_out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p_values + o)
    for _ in range(STEPS):
        b = tl.exp2(-b)  # stays between 0 and 1; the sign is part of the instruction
    tl.store(p_out + o, b)


def exponentials(values: Tensor) -> Tensor:
    """Powers of 2 of powers of 2 of `values`, STEPS times."""
    out = torch.empty_like(values)
    programs = values.numel() // BLOCK
    _exponentials_kernel[(programs,)](values, out, STEPS=STEPS, BLOCK=BLOCK, num_warps=4)
    return out


def count(values: Tensor) -> int:
    """How many exponentials `exponentials` makes."""
    return values.numel() // BLOCK * BLOCK * STEPS
