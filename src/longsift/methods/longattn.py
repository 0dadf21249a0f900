"""LongAttn: token-level dependency in the first decoder layer (Wu et al., Findings of ACL 2025, arXiv 2502.16860)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from longsift.errors import UsageError
from longsift.methods.query_sample import draw_queries, ordered_sum
from longsift.rules import ScoreRule, Term

if TYPE_CHECKING:
    import torch

    from longsift.calculators.first_layer import FirstLayer


SINK = 128  # tokens: LADM's first span, which draws attention whatever the text is


def far_distance(length: int) -> int:
    """The distance, in tokens, from which a key counts as far: `length - 3·(length // 4)`, about a quarter."""
    return length - 3 * (length // 4)


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
        query_fraction: share of the queries to measure, 1 or 1/m for a whole m, or text such as "1/8". Below 1, the
            two measures are unbiased estimates (the variance but for the square of the strength's error, which is
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
        object.__setattr__(self, "query_fraction", 1 / self._every())

    def _every(self) -> int:
        """One query in so many is measured."""
        try:
            fraction = Fraction(self.query_fraction).limit_denominator(10**6)
        except (ValueError, OverflowError, ZeroDivisionError):
            fraction = Fraction(0)
        if fraction.numerator != 1:
            raise UsageError(
                f"--query-fraction takes 1 or a part of it such as 1/8 or 0.125, not {self.query_fraction}."
            )
        return fraction.denominator

    def columns(self) -> tuple[pa.Field, ...]:
        names = ["dependency_strength", "variance"]
        if self._every() > 1:
            names += ["dependency_strength_error", "variance_error"]
        means = tuple(pa.field(name, pa.float64()) for name in names)
        if not self.detail:
            return means
        heads = pa.list_(pa.float32())
        return (*means, pa.field("dependency_strength_heads", heads), pa.field("variance_heads", heads))

    def shortest(self) -> int:
        # Below, there is no query with a far key; or too few blocks of them to say how they differ.
        queries = 1 if self._every() == 1 else 2 * self._every() + 1
        return 4 * -(-(self._skip() + queries) // 3)

    def _skip(self) -> int:
        return SINK if self.skip_sink else 0

    def measure(self, calculator: FirstLayer, input_ids: torch.Tensor) -> dict[str, Any]:
        import torch

        from longsift.attention import far_statistics

        batch, length = input_ids.shape
        distance, skip, every = far_distance(length), self._skip(), self._every()
        sample = None if every == 1 else draw_queries(length, distance + skip, every, calculator.device)
        rows = None if sample is None else sample.rows

        def far_rows(kv_heads: range) -> tuple[torch.Tensor, torch.Tensor]:
            layer = calculator.queries_keys(input_ids, rows=rows, kv_heads=kv_heads)
            far = far_statistics(
                layer.q, layer.k, distance, rows=rows, skip=skip, scale=layer.scale, softcap=layer.softcap
            )
            return far.mass, far.squares

        queries = length if rows is None else len(rows)
        parts = [far_rows(kv_heads) for kv_heads in calculator.shares(batch * queries)]
        mass, squares = (torch.cat(some, 1) for some in zip(*parts, strict=True))  # (batch, heads, queries)
        total = ordered_sum if sample is None else sample.total
        strength = total(mass) / length
        variance = (total(squares) - strength.square()) / (length * length - 1)
        columns = {"dependency_strength": _mean(strength), "variance": _mean(variance)}
        if sample is not None:
            # What each query adds, at first order, to (Σ squares − (Σ mass / L)²), of which the variance is made.
            added = squares - (2 / length) * strength[..., None] * mass
            errors = sample.standard_error(_mean(mass)) / length, sample.standard_error(_mean(added))
            columns["dependency_strength_error"] = errors[0]
            columns["variance_error"] = errors[1] / (length * length - 1)
        if self.detail:
            columns |= {"dependency_strength_heads": strength, "variance_heads": variance}
        return columns

    def rule(self) -> ScoreRule:
        return ScoreRule(
            terms=(Term("dependency_strength", 1.0), Term("variance", -self.alpha)), normalize=self.normalize
        )


def _mean(heads: torch.Tensor) -> torch.Tensor:
    """The mean over heads of (batch, heads, …), in float64."""
    return ordered_sum(heads.movedim(1, -1)) / heads.shape[1]
