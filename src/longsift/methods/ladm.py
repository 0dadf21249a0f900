"""LADM: span-level dependency in every layer of a small model (Chen et al., ACL 2025, arXiv 2503.02502)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from longsift.errors import UsageError
from longsift.rules import ScoreRule, Term

if TYPE_CHECKING:
    import torch

    from longsift.calculators import LayerAttention
    from longsift.calculators.full import FullModel


@dataclass(frozen=True)
class Ladm:
    """Contextual dependency score: PFS between spans → AFS of a span → CDS of a window.

    Args:
        span: tokens in a span.
        d_afs: spans between two key spans that a query span is compared with.
        d_cds: spans between two query spans that are measured.
        ablation: "no-std" leaves out the spread of the PFS, "no-len-weight" the weights by distance and position.
        denominator: what a query attends to: "prior" (published code) all tokens before its span, "causal"
            (the paper's text) these and its own span up to itself.
        dense: measure every pair of spans, `d_afs = d_cds = 1`.
        layer_aggregation: how the layers become one score: "mean" (the paper's) of their CDS, in which the layers
            of the largest CDS, often the first, outweigh the others; "zscore" the mean of the z-score that each
            layer has within the window's group. Decided at selection, from `cds_layers`.
    """

    span: int = 128
    d_afs: int = 4
    d_cds: int = 4
    ablation: Literal["none", "no-std", "no-len-weight"] = "none"
    denominator: Literal["prior", "causal"] = "prior"
    dense: bool = False
    layer_aggregation: Literal["mean", "zscore"] = "mean"

    name: ClassVar[str] = "ladm"
    calculator: ClassVar[Literal["full"]] = "full"
    citation: ClassVar[str] = (
        "Chen et al. LADM: Long-context Training Data Selection with Attention-based Dependency Measurement "
        "for LLMs. ACL 2025. arXiv:2503.02502"
    )

    needless: ClassVar[dict[str, str]] = {"skip_sink": "The first span, the sink, is never a key span there."}

    def __post_init__(self) -> None:
        if self.ablation not in ("none", "no-std", "no-len-weight"):
            raise UsageError(f"--ablation takes none, no-std or no-len-weight, not '{self.ablation}'.")
        if self.denominator not in ("prior", "causal"):
            raise UsageError(f"--denominator takes prior or causal, not '{self.denominator}'.")
        if self.layer_aggregation not in ("mean", "zscore"):
            raise UsageError(f"--layer-aggregation takes mean or zscore, not '{self.layer_aggregation}'.")
        if min(self.span, self.d_afs, self.d_cds) < 1:
            raise UsageError("--span, --d-afs and --d-cds are at least 1.")
        if self.dense:
            object.__setattr__(self, "d_afs", 1)
            object.__setattr__(self, "d_cds", 1)

    def columns(self) -> tuple[pa.Field, ...]:
        return (
            pa.field("cds", pa.float64()),
            pa.field("cds_layers", pa.list_(pa.float64())),
            pa.field("layers", pa.list_(pa.int16())),  # the layers that cds_layers are of, in order
        )

    def shortest(self) -> int:
        # The last query span starts at length - span, and must start after span + 4 intervals.
        return 2 * self.span + 4 * self.span * self.d_afs + 1

    def measure(self, calculator: FullModel, input_ids: torch.Tensor) -> dict[str, Any]:
        import torch

        from longsift.attention import attention_and_focus, span_focus

        length = input_ids.shape[1]

        def options(layer: LayerAttention) -> dict[str, Any]:
            return {
                "scale": layer.scale,
                "softcap": layer.softcap,
                "denominator": self.denominator,
                "query_spans": self.query_spans(length),
                "average_heads": True,
            }

        def reduce(layer: LayerAttention) -> torch.Tensor:
            focus = span_focus(layer.q, layer.k, self.span, **options(layer))
            return self.contextual_dependency(focus[0].double(), length)

        def reduce_and_attend(layer: LayerAttention, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output, focus = attention_and_focus(layer.q, layer.k, values, self.span, **options(layer))
            return self.contextual_dependency(focus[0].double(), length), output

        def columns(window: torch.Tensor) -> dict[str, torch.Tensor]:
            layers = torch.stack([*calculator.reduce(window, reduce, and_attend=reduce_and_attend).values()])
            return {"cds": layers.mean(), "cds_layers": layers}

        return {
            **calculator.each_window(input_ids, columns, key=self),
            "layers": list(calculator.global_layers(length)),
        }

    def query_spans(self, length: int) -> range:
        """Indices of the query spans of a window, last first; spans are aligned to the window's end."""
        first_start = self.span + 4 * self.span * self.d_afs  # a query span starts after it
        return range(length // self.span - 1, (first_start - length % self.span) // self.span, -self.d_cds)

    def contextual_dependency(self, focus: torch.Tensor, length: int) -> torch.Tensor:
        """CDS of one layer.

        Args:
            focus: attention mass (mean over heads) from each of `query_spans(length)` to every span,
                (query_spans, spans).
            length: tokens in the window.

        Returns:
            A scalar on the device of `focus`, in its dtype.

        Source: LADM, section 3; METHODS of the published code (std unbiased, over the unweighted PFS).
        """
        import torch

        spans = self.query_spans(length)
        # Made where it is used: a copy from the host would have to wait for the GPU.
        query = torch.arange(spans.start, spans.stop, spans.step, device=focus.device)[:, None]
        key = torch.arange(focus.shape[1], device=focus.device)
        gap = query - key
        compared = (gap > 0) & (gap % self.d_afs == 0) & (key >= 1)  # the first span (the sink) is never a key
        pairwise = focus.where(compared, 0.0)  # PFS
        total = pairwise.sum(1)
        deviation = (pairwise - (total / compared.sum(1))[:, None]).where(compared, 0.0)
        spread = (deviation.square().sum(1) / (compared.sum(1) - 1)).sqrt()

        if self.ablation != "no-len-weight":
            start = length % self.span + query[:, 0] * self.span
            total = (pairwise * gap).sum(1) * (self.span / length) * (start / length)
        dependencies = total if self.ablation == "no-std" else spread * total  # AFS
        return dependencies.mean()

    def rule(self) -> ScoreRule:
        if self.layer_aggregation == "zscore":
            return ScoreRule(terms=(Term("cds_layers", 1.0, each=True),), normalize="zscore")
        return ScoreRule(terms=(Term("cds", 1.0),), normalize="none")
