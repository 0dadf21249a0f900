"""Calibrated far focus: a few chosen heads, weighed so that coherent windows stand above controls of every kind.

LongAttn and LADM average over all heads, of which most see no long-range dependency and some are drawn by tables of
numbers. A calibration (`longsift calibrate`) says which heads of which layers to look at and how to weigh them; the
forward stops at the deepest of these layers, and the others' statistics are never computed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from longsift.errors import ModelError, UsageError
from longsift.selection import ScoreRule, Term

if TYPE_CHECKING:
    import torch

    from longsift.calculators import LayerAttention
    from longsift.calculators.full import FullModel

log = logging.getLogger(__name__)

STATISTICS = ("far", "weighted", "sink", "spread", "variation", "peak", "near", "unsteady")
FAR = 0.25  # a key is far when it is at least this share of the window behind its query, as in LongAttn


def head_statistics(focus: torch.Tensor) -> torch.Tensor:
    """What each head does with its far past, from its attention mass between spans.

    With p[j, c] the mean probability that a token of query span j gives to all of span c, over the query spans j
    that have at least two far spans c (c ≥ 1, since span 0 is the attention sink, and (j - c) ≥ J/4):

    - `far`: mean over j of Σ p[j, far c];
    - `weighted`: mean over j of Σ p[j, c ≥ 1] · (j - c)/J;
    - `sink`: mean over j of p[j, 0];
    - `spread`: mean over j of the standard deviation of p[j, far c] over c;
    - `variation`: mean over j of that deviation over the mean of p[j, far c];
    - `peak`: mean over j of the largest p[j, far c];
    - `near`: mean over j of p[j, j];
    - `unsteady`: standard deviation over j of Σ p[j, far c].

    Args:
        focus: `span_focus(..., denominator="causal")` of all spans over the span's tokens, (heads, J, J): rows are
            probabilities, so divide the masses by the span.

    Returns:
        (heads, len(STATISTICS)), float64.

    Raises:
        ValueError: fewer than 8 spans.
    """
    import torch

    n_spans = focus.shape[-1]
    if n_spans < 8:
        raise ValueError(f"head statistics need at least 8 spans; got {n_spans}")
    p = focus.double()
    reach = math.ceil(FAR * n_spans)
    first = reach + 2  # the first query span with two far spans: 1 and 2
    span = torch.arange(n_spans, device=p.device)
    gap = span[first:, None] - span
    p = p[:, first:]
    inside = (gap >= 0) & (span >= 1)
    far = (gap >= reach) & (span >= 1)
    count = far.sum(-1)  # (query spans,)
    far_mass = p.where(far, 0.0)
    total = far_mass.sum(-1)  # (heads, query spans)
    mean = total / count
    deviation = (far_mass - mean[..., None]).where(far, 0.0).square().sum(-1)
    spread = (deviation / (count - 1)).sqrt()
    columns = (
        total.mean(-1),
        (p.where(inside, 0.0) * gap.clamp(min=0)).sum(-1).mean(-1) / n_spans,
        p[..., 0].mean(-1),
        spread.mean(-1),
        (spread / mean.clamp(min=1e-12)).mean(-1),
        far_mass.amax(-1).mean(-1),
        p.diagonal(first, -2, -1).mean(-1),
        total.std(-1),
    )
    return torch.stack(columns, -1)
