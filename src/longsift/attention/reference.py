"""The definition of every measure, plain and slow: it holds the whole attention map of a window.

The other backends are tested against this file. All functions compute in the dtype of their inputs; give
float64 for the specification. Equations: LongAttn (arXiv 2502.16860) and LADM (arXiv 2503.02502), see
`longsift.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_logits(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Unmasked logits (batch, heads, length, length) of q (batch, heads, length, d) and the shared keys k."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.transpose(-1, -2)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_distances(length: int, device: torch.device) -> Tensor:
    """(length, length): query position minus key position, in tokens; negative in the future."""
    position = torch.arange(length, device=device)
    return position[:, None] - position[None, :]


def far_rows(
    q: Tensor,
    k: Tensor,
    distance: int,
    *,
    rows: Tensor | None = None,
    skip: int = 0,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Far mass and squares of every query, each (batch, heads, rows); see `longsift.attention.far_statistics`."""
    keys = torch.arange(k.shape[2], device=q.device)
    back = (keys if rows is None else rows)[:, None] - keys
    hidden = back < 0
    if sliding_window is not None:
        hidden = hidden | (back >= sliding_window)
    p = attention_logits(q, k, scale, softcap).masked_fill(hidden, -torch.inf).softmax(-1)
    near = (back < distance) | (keys < skip)
    far = p.masked_fill(near, 0.0)
    return far.sum(-1), far.square().sum(-1)


def span_focus(
    q: Tensor,
    k: Tensor,
    span: int,
    *,
    scale: float,
    softcap: float | None = None,
    denominator: str = "prior",
    query_spans: Sequence[int],
) -> Tensor:
    """Mass from query spans to key spans, (batch, heads, Q, J); see `longsift.attention.span_focus`."""
    batch, heads, length, _ = q.shape
    n_spans = length // span
    lead = length % span
    logits = attention_logits(q, k, scale, softcap)
    future = token_distances(length, q.device) < 0
    rows = []
    for j in query_spans:
        start, end = lead + j * span, lead + (j + 1) * span
        visible = start if denominator == "prior" else end
        focus = logits.new_zeros(batch, heads, n_spans)
        if visible > 0:
            hidden = future[start:end, :visible]  # all False under "prior": every key lies before the span
            p = logits[:, :, start:end, :visible].masked_fill(hidden, -torch.inf).softmax(-1)
            mass = p[..., lead:].sum(2)  # (batch, heads, visible - lead)
            focus[..., : mass.shape[-1] // span] = mass.reshape(batch, heads, -1, span).sum(-1)
        rows.append(focus)
    return torch.stack(rows, 2)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention output (batch, heads, length, d_v); see `longsift.attention.causal_attention`."""
    distance = token_distances(q.shape[2], q.device)
    hidden = distance < 0
    if sliding_window is not None:
        hidden = hidden | (distance >= sliding_window)
    p = attention_logits(q, k, scale, softcap).masked_fill(hidden, -torch.inf).softmax(-1)
    return p @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
