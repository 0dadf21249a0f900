"""A sample of a window's queries, and how far an estimate from it may be off."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuerySample:
    """Independent draws of some queries of a window, and how many queries each of them stands for.

    Attributes:
        rows: ascending positions, (draws, n) int64.
        weights: queries that each stands for in its draw, (n,) float64; a sum over all queries is estimated by the
            weighted sum.
    """

    rows: Tensor
    weights: Tensor

    def total(self, values: Tensor) -> Tensor:
        """The unbiased estimate (…) of the sum over all queries of `values` (…, n)."""
        return ordered_sum(values * self.weights)

    def standard_error(self, values: Tensor) -> Tensor:
        """The standard error (…) of `total(values)` for `values` (…, n), n at least 3.

        `√(Σ w(w − 1) · Σ (y_i − 2y_{i−1} + y_{i−2})² / (6(n − 2)))`: the estimator from successive second differences,
        with the finite population factor of each block, 1 − 1/w (Wolter, Introduction to Variance Estimation, 2nd ed.
        2007, section 8.2). Second differences of neighbours, in which a trend cancels, stand for the spread within
        a block, from which only one query is drawn. Where queries are the more alike the nearer they are, it is
        too large rather than too small.
        """
        differences = values[..., 2:] - 2 * values[..., 1:-1] + values[..., :-2]
        spread = ordered_sum(differences.square()) / (6 * (values.shape[-1] - 2))
        return (ordered_sum(self.weights * (self.weights - 1)) * spread).sqrt()


@functools.lru_cache(maxsize=16)
def draw_queries(length: int, first: int, fraction: float, draws: int, device: torch.device) -> QuerySample:
    """One query drawn uniformly from each block of consecutive queries; sizes of blocks differ by one at most.

    The same ones for every window of a length, so that their scores compare; nothing depends on batch or order.

    Args:
        length: queries of the window.
        first: queries before it have nothing to measure, and none is drawn from them.
        fraction: queries drawn, as a share of all of the window.
        draws: how often, independently.
    """
    import torch

    count = min(math.ceil(length * fraction), length - first)
    bounds = first + np.arange(count + 1) * (length - first) // count
    sizes = np.diff(bounds)
    # Raw numbers of a generator that every version of NumPy keeps; the remainder's bias is below 2^-40.
    raw = np.random.PCG64([length, count]).random_raw((draws, count))
    rows = bounds[:-1] + (raw % sizes.astype(np.uint64)).astype(np.int64)
    return QuerySample(torch.from_numpy(rows).to(device), torch.from_numpy(sizes.astype(np.float64)).to(device))


def ordered_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, in float64, by halving: its order depends on the number of terms alone.

    A library's own sum takes another order, and so other bits, when there are more sums to make at once.
    """
    import torch

    count = values.shape[-1]
    half = 1 << (count - 1).bit_length() >> 1
    if half == 0:
        return values[..., 0].double()
    total = values[..., :half].to(torch.float64, copy=True)
    total[..., : count - half] += values[..., half:]
    while half > 1:
        half //= 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
