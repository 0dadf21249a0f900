"""LongAttn: token-level dependency in the first decoder layer (Wu et al., Findings of ACL 2025, arXiv 2502.16860)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from longsift.errors import UsageError
from longsift.selection import ScoreRule, Term

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
    """

    alpha: float = 0.5
    normalize: Literal["zscore", "minmax"] = "zscore"
    detail: bool = False
    skip_sink: bool = False

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

    def columns(self) -> tuple[pa.Field, ...]:
        means = (pa.field("dependency_strength", pa.float64()), pa.field("variance", pa.float64()))
        if not self.detail:
            return means
        heads = pa.list_(pa.float32())
        return (*means, pa.field("dependency_strength_heads", heads), pa.field("variance_heads", heads))

    def shortest(self) -> int:
        # Below, no pair of tokens is far.
        return 4 * -(-(SINK + 1) // 3) if self.skip_sink else 4

    def measure(self, calculator: FirstLayer, input_ids: torch.Tensor) -> dict[str, Any]:
        from longsift.attention import far_statistics

        layer = calculator.queries_keys(input_ids[None])
        far = far_statistics(
            layer.q,
            layer.k,
            far_distance(len(input_ids)),
            skip=SINK if self.skip_sink else 0,
            scale=layer.scale,
            softcap=layer.softcap,
        )
        strength, variance = far.strength[0].double(), far.variance[0].double()
        row: dict[str, Any] = {
            "dependency_strength": strength.mean().item(),
            "variance": variance.mean().item(),
        }
        if self.detail:
            row |= {"dependency_strength_heads": strength.tolist(), "variance_heads": variance.tolist()}
        return row

    def rule(self) -> ScoreRule:
        return ScoreRule(
            terms=(Term("dependency_strength", 1.0), Term("variance", -self.alpha)), normalize=self.normalize
        )
