"""Calculators: the models that supply the queries and keys whose attention is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one attention layer computes its probabilities from.

    Attributes:
        layer: index of the decoder layer.
        q: queries after RoPE and any q norm, (batch, heads, length, head_dim).
        k: keys after RoPE and any k norm, (batch, kv_heads, length, head_dim); not repeated for grouped heads.
        scale: factor of the logits, usually 1/√head_dim.
        softcap: logits become softcap·tanh(logits/softcap) when given.
        sliding_window: tokens that a query sees, itself included; None where it sees its whole past.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
