"""Where one window draws on its past: the dependency map between its spans, and the far mass of its positions.

Nothing of size length × length is held: a map has a row and a column for every span.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from longsift.attention import Denominator, far_statistics, span_focus
from longsift.calculators import LayerAttention
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.errors import ModelError, UsageError
from longsift.methods.longattn import far_distance

POINTS = 512  # of a curve, at most

# Shares are kept as one byte, by their logarithm: 0 is below SMALLEST, 255 is 1, and a step is 4.6 %.
SMALLEST = 1e-5
LEVELS = 255


@dataclass(frozen=True, slots=True)
class FarCurve:
    """How much the first layer attends to the far past, by position (LongAttn, arXiv 2502.16860).

    Attributes:
        positions: (points,) mean position of the queries of each point, tokens.
        mass: (points,) mean of their far mass, a share of their attention; mean over heads.
        strength: mean of all queries: LongAttn's dependency strength.
        distance: least distance of a key that counts as far, tokens.
    """

    positions: npt.NDArray[np.float64]
    mass: npt.NDArray[np.float64]
    strength: float
    distance: int


@dataclass(frozen=True, slots=True)
class DependencyMap:
    """How much every span of a window draws on every span before it.

    Entry [j, c] is the mean probability that a token of query span j gives to all of key span c, mean over heads:
    LADM's PFS (arXiv 2503.02502) divided by the tokens of a span. Spans are aligned to the window's end, as LADM's.

    Attributes:
        shares: (layers, J, J) float32, 0 above the diagonal.
        heads: by layer, (heads, J, J) float32 of each head, for the layers whose heads were asked for.
        layers: the measured layers, by index.
        span: tokens of a span.
        length: tokens of the window; the first `length % span` of them are in no span.
        denominator: what a row's shares are shares of: "causal", all attention of the span's tokens, or "prior", what
            they give to the tokens before their span.
        curve: the far mass of the first layer; None where it was not asked for or that layer sees no far past.
    """

    shares: npt.NDArray[np.float32]
    layers: tuple[int, ...]
    span: int
    length: int
    denominator: Denominator = "causal"
    heads: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    curve: FarCurve | None = None

    @property
    def n_spans(self) -> int:
        return int(self.shares.shape[-1])

    def mean(self) -> npt.NDArray[np.float32]:
        """The mean of the layers, (J, J)."""
        mean: npt.NDArray[np.float32] = self.shares.mean(0, dtype=np.float64).astype(np.float32)
        return mean

    def starts(self) -> npt.NDArray[np.int64]:
        """Where each span begins, (J,), in tokens of the window."""
        return self.length % self.span + self.span * np.arange(self.n_spans, dtype=np.int64)


def pooled(shares: npt.NDArray[np.float32], spans: int) -> npt.NDArray[np.float32]:
    """A map of (J, J) as one between `spans` spans together: the mean over queries of the sum over keys.

    Cells are aligned to the end, so that the first row and column may stand for fewer spans.
    """
    lead = -shares.shape[0] % spans
    cells = (shares.shape[0] + lead) // spans
    padded = np.pad(shares, ((lead, 0), (lead, 0)))
    sums = padded.reshape(cells, spans, cells, spans).sum((1, 3), dtype=np.float64)
    rows = np.full(cells, spans)
    rows[0] -= lead
    means: npt.NDArray[np.float32] = (sums / rows[:, None]).astype(np.float32)
    return means


def quantise(shares: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Shares from 0 to 1 as bytes: 1 to 255 are `SMALLEST` to 1 in equal steps of the logarithm; 0 is less.

    So level n stands for `SMALLEST ** (1 - (n - 1) / (LEVELS - 1))`, within 2.3 %.
    """
    with np.errstate(divide="ignore"):
        level = 1 + (LEVELS - 1) * (1 - np.log(shares) / math.log(SMALLEST))
    rounded: npt.NDArray[np.uint8] = np.where(shares < SMALLEST, 0, np.clip(level.round(), 1, LEVELS)).astype(np.uint8)
    return rounded


def dependency_map(
    calculator: FullModel | FirstLayer,
    input_ids: Sequence[int] | npt.NDArray[Any] | torch.Tensor,
    *,
    span: int = 128,
    layers: Sequence[int] | None = None,
    heads: Collection[int] = (),
    denominator: Denominator = "causal",
    curve: bool = False,
) -> DependencyMap:
    """Measure every pair of spans of one window: LADM's PFS, dense, in each layer that sees the whole window.

    Args:
        calculator: a whole model, or a model's first layer.
        input_ids: the window's token ids, (length,).
        span: tokens of a span.
        layers: measure only these of the layers that see the whole window; by default all of them.
        heads: layers of which every head is kept too.
        denominator: "causal" divides by all attention of a token, "prior" (LADM's published code) by what it gives to
            the tokens before its span.
        curve: measure the far mass of the first layer, too, where it sees the whole window.

    Raises:
        UsageError: a span that does not fit into the window twice.
        ModelError: ids outside the vocabulary, or layers that cannot be measured.
    """
    ids = torch.as_tensor(input_ids)[None]
    length = ids.shape[1]
    if not 1 <= span <= length // 2:
        raise UsageError(
            f"A span of {span:,} tokens does not fit twice into the {length:,} of the window: take --span "
            f"{max(length // 16, 1)} or less."
        )

    def focus(layer: LayerAttention) -> npt.NDArray[np.float32]:
        if layer.sliding_window is not None and layer.sliding_window < length:
            raise ModelError(
                f"Layer {layer.layer} sees only the last {layer.sliding_window:,} of {length:,} tokens, so it has no "
                "map: name layers that see the whole window with --layers."
            )
        mass = span_focus(layer.q, layer.k, span, scale=layer.scale, softcap=layer.softcap, denominator=denominator)
        each: npt.NDArray[np.float32] = (mass[0] / span).float().cpu().numpy()
        return each

    def reduce(layer: LayerAttention) -> _Measured:
        each = focus(layer) if layer.layer in wanted else None
        return _Measured(
            None if each is None else each.mean(0, dtype=np.float64).astype(np.float32),
            each if layer.layer in heads else None,
            _far_curve(layer, length) if curve and layer.layer == 0 else None,
        )

    with torch.inference_mode():
        if isinstance(calculator, FirstLayer):
            wanted = {0} if layers is None else set(layers)
            if wanted != {0}:
                raise ModelError(
                    f"Of this calculator only layer 0 is loaded, and layers {sorted(wanted)} were asked for."
                )
            measured = {0: reduce(calculator.queries_keys(ids))}
        else:
            seeing = calculator.global_layers(length)
            wanted = set(seeing if layers is None else layers)
            also = {0} if curve and 0 in seeing else set()
            measured = calculator.reduce(ids, reduce, layers=sorted(wanted | also))
    order = tuple(sorted(wanted))
    return DependencyMap(
        shares=np.stack([share for layer in order if (share := measured[layer].shares) is not None]),
        layers=order,
        span=span,
        length=length,
        denominator=denominator,
        heads={layer: each for layer in order if (each := measured[layer].heads) is not None},
        curve=measured[0].curve if 0 in measured else None,
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """What is kept of a layer."""

    shares: npt.NDArray[np.float32] | None
    heads: npt.NDArray[np.float32] | None
    curve: FarCurve | None


def _far_curve(layer: LayerAttention, length: int) -> FarCurve:
    distance = far_distance(length)
    far = far_statistics(layer.q, layer.k, distance, scale=layer.scale, softcap=layer.softcap)  # of a global layer
    mass = far.mass[0].double().mean(0).cpu().numpy()
    points = min(POINTS, length)
    cuts = np.arange(points) * length // points
    counts = np.diff([*cuts, length])
    positions = cuts + (counts - 1) / 2
    return FarCurve(positions, np.add.reduceat(mass, cuts) / counts, float(mass.mean()), distance)
