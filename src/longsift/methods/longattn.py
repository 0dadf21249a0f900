"""LongAttn: token-level dependency in the first decoder layer (Wu et al., Findings of ACL 2025, arXiv 2502.16860)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from longsift.errors import ModelError, UsageError
from longsift.methods.query_sample import draw_queries, ordered_sum
from longsift.rules import ScoreRule, Term

if TYPE_CHECKING:
    import torch

    from longsift.attention import FarStatistics
    from longsift.calculators import LayerAttention
    from longsift.calculators.first_layer import FirstLayer


SINK = 128  # tokens: LADM's first span, which draws attention whatever the text is

# Heads see alike in a token, so a sample tells more where not all heads have the same queries. With more draws a GPU
# would have too little to do at a time.
DRAWS = 4


def far_distance(length: int) -> int:
    """The distance, in tokens, from which a key counts as far: `length - 3·(length // 4)`, about a quarter."""
    return length - 3 * (length // 4)


def far_attention(layer: LayerAttention, rows: torch.Tensor | None = None, skip: int = 0) -> FarStatistics:
    """What a first layer gives to the keys from the far distance on; of a sliding one, those that it still sees.

    Args:
        layer: of whole windows, or with the queries at `rows` alone.
        rows, skip: as for `far_statistics`.

    Raises:
        ModelError: its sliding window ends before the far distance, so that no query sees a far key.
    """
    from longsift.attention import far_statistics

    length, seen = layer.k.shape[2], layer.sliding_window
    distance = far_distance(length)
    if seen is not None and seen <= distance:
        raise ModelError(
            f"The first layer sees only the last {seen} tokens, and far keys of a window of {length} are {distance} or "
            f"more back. Choose shorter windows, a model whose first layer is global, or --method ladm, which measures "
            "the global layers."
        )
    return far_statistics(
        layer.q,
        layer.k,
        distance,
        rows=rows,
        skip=skip,
        scale=layer.scale,
        softcap=layer.softcap,
        sliding_window=seen,
    )


@dataclass(frozen=True)
class LongAttn:
    """Dependency strength and distribution uniformity of the far part of the attention map, mean over heads.

    The score of a window is Z(strength) + alpha·Z(−variance), Z taken within the window's group.

    Args:
        alpha: weight of the uniformity.
        normalize: "zscore" as in the paper, or "minmax" as in the published code.
        detail: also write the values of every head.
        skip_sink: never count the first 128 tokens as far, in strength and in variance; they stay in the softmax.
            The paper counts them.
        query_fraction: share of the queries to measure, above 0 and up to 1, or text such as "1/8". Below 1, the two
            measures are unbiased estimates (the variance but for the square of the strength's error, which is
            far below its own), with their standard errors in columns of their own; see `query_sample`.
    """

    alpha: float = 0.5
    normalize: Literal["zscore", "minmax"] = "zscore"
    detail: bool = False
    skip_sink: bool = False
    query_fraction: float | str = 1.0

    name: ClassVar[str] = "longattn"
    calculator: ClassVar[Literal["first_layer"]] = "first_layer"
    citation: ClassVar[str] = (
        "Wu et al. LongAttn: Selecting Long-context Training Data via Token-level Attention. "
        "Findings of ACL 2025. arXiv:2502.16860"
    )

    def __post_init__(self) -> None:
        if self.normalize not in ("zscore", "minmax"):
            raise UsageError(f"--normalize takes zscore or minmax, not '{self.normalize}'.")
        if not abs(self.alpha) <= 1e6:  # also refuses NaN
            raise UsageError(f"--alpha is a number between -1e6 and 1e6, not {self.alpha}.")
        object.__setattr__(self, "query_fraction", self._fraction())

    def _fraction(self) -> float:
        try:
            fraction = float(Fraction(self.query_fraction))
        except (ValueError, OverflowError, ZeroDivisionError):
            fraction = math.nan
        if not 1e-6 <= fraction <= 1:
            raise UsageError(
                f"--query-fraction takes a share such as 1/8 or 0.125, up to 1, not '{self.query_fraction}'."
            )
        return fraction

    def columns(self) -> tuple[pa.Field, ...]:
        names = ["dependency_strength", "variance"]
        if self._fraction() < 1:
            names += ["dependency_strength_error", "variance_error"]
        means = tuple(pa.field(name, pa.float64()) for name in names)
        if not self.detail:
            return means
        heads = pa.list_(pa.float32())
        return (*means, pa.field("dependency_strength_heads", heads), pa.field("variance_heads", heads))

    def shortest(self) -> int:
        # Below, there is no query with a far key; or there are too few in a sample to say how they differ.
        queries, tokens = (1, 0) if self._fraction() == 1 else (3, math.floor(2 / self._fraction()) + 1)
        return max(4 * -(-((SINK if self.skip_sink else 0) + queries) // 3), tokens)

    def measure(self, calculator: FirstLayer, input_ids: torch.Tensor) -> dict[str, Any]:
        import torch

        batch, length = input_ids.shape
        distance, skip, fraction = far_distance(length), SINK if self.skip_sink else 0, self._fraction()
        shares = calculator.shares(batch * length) if fraction == 1 else _draws(calculator.kv_heads)
        sample = None
        if fraction < 1:
            sample = draw_queries(length, distance + skip, fraction, len(shares), calculator.device)
        measured = []
        for i, kv_heads in enumerate(shares):
            rows = None if sample is None else sample.rows[i]
            layer = calculator.queries_keys(input_ids, rows=rows, kv_heads=kv_heads)
            far = far_attention(layer, rows, skip)
            del layer  # the next heads may need its memory
            measured.append(torch.stack([far.mass, far.squares]))
        sums = torch.cat(measured, 2)  # (2, batch, heads, queries)
        heads, entries = sums.shape[2], length * length
        mass, squares = ordered_sum(sums) if sample is None else sample.total(sums)
        strength = mass / length  # (batch, heads)
        variance = (squares - strength.square()) / (entries - 1)
        columns = {"dependency_strength": _over_heads(strength) / heads, "variance": _over_heads(variance) / heads}
        if sample is not None:
            # What a query adds, at first order, to Σ squares − (Σ mass / L)², of which the variance is made
            added = sums[1] - (2 / length) * strength[..., None] * sums[0]
            widths = [part.shape[2] for part in measured]
            draws = map(_over_heads, torch.split(torch.stack([sums[0].double(), added]), widths, 2))
            errors = sample.standard_error(torch.stack([*draws], -2))  # (2, batch, draws)
            error, variance_error = ordered_sum(errors.square()).sqrt()  # of independent draws
            columns["dependency_strength_error"] = error / (heads * length)
            columns["variance_error"] = variance_error / (heads * (entries - 1))
        if self.detail:
            columns |= {"dependency_strength_heads": strength, "variance_heads": variance}
        return columns

    def rule(self) -> ScoreRule:
        return ScoreRule(
            terms=(Term("dependency_strength", 1.0), Term("variance", -self.alpha)), normalize=self.normalize
        )


def _draws(kv_heads: int) -> list[range]:
    """The key heads, shared out to independent draws of queries."""
    draws = min(kv_heads, DRAWS)
    return [range(i * kv_heads // draws, (i + 1) * kv_heads // draws) for i in range(draws)]


def _over_heads(values: torch.Tensor) -> torch.Tensor:
    """The sum over heads of (batch, heads) or (2, batch, heads, queries), in float64."""
    return ordered_sum(values if values.ndim == 2 else values.movedim(2, -1))
