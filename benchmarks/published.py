"""LongAttn and LADM the way their authors published them, to compare with: the same steps with the same intermediate
results, written anew from what their code does, inside a model of today's transformers.

LongAttn: the whole first layer in float16. The mask of the far pairs is made on the host in float32 and copied, for
every window; keys and values of grouped heads are copied. Then, a head after another: the map of the logits in float16,
its softmax in float32 and back, times the mask (float32), the variance and the sum of the whole map, the map times V.
Output projection and MLP follow, whose results nobody reads. There is no causal mask, as in the published code with its
default setting and a full window: with it, each head's map would be read and written once more.

LADM: the whole model in float16; keys and values of grouped heads are copied; in each layer, for every query span on
its own, the map of its rows over all earlier keys (float16, softmax in float32), its mean over heads and sum over
rows, and one sum for every key span. FlashAttention-2 is replaced by PyTorch's SDPA, which takes the same kernel or a
faster one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from shapes import random_network

SPAN, D_AFS, D_CDS = 128, 4, 4

Measured = tuple[Tensor, Tensor]  # the layer's output (batch, heads, length, head_dim), and what was measured


def far_mask(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The float32 mask of the far pairs, and the triangle that it was made of, which stays in memory beside it."""
    size = 3 * (length // 4)
    mask = torch.zeros(length, length).to(device)
    triangle = torch.tril(torch.ones(size, size)).to(device)
    mask[length - size :, :size] = triangle
    return mask, triangle


def longattn_layer(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Measured:
    """Strength and variance of every head, (2, batch, heads)."""
    batch, heads, length, head_dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    mask, _triangle = far_mask(length, q.device)
    measured = torch.zeros(2, batch, heads, device=q.device)
    out = torch.zeros(batch, heads, length, head_dim, device=q.device)
    for head in range(heads):
        for row in range(batch):
            p = torch.matmul(q[row, head], k[row, head].transpose(0, 1)) * scale
            p = torch.softmax(p, -1, dtype=torch.float32).to(q.dtype)
            far = p * mask
            measured[1, row, head] = far.var()
            measured[0, row, head] = far.sum() / length
            out[row, head] = torch.matmul(p, v[row, head])
    return out.to(q.dtype), measured


def ladm_layer(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Measured:
    """The layer's CDS of every window, (batch,)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    dependency = ladm_dependency(q, k, scale)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), dependency


def ladm_dependency(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """CDS of every window, (batch,), from queries and keys (batch, heads, length, head_dim)."""
    length = q.shape[2]
    interval, stride = SPAN * D_AFS, SPAN * D_CDS
    dependencies = []
    for start in range(length - SPAN, SPAN + 4 * interval, -stride):
        logits = torch.matmul(q[:, :, start : start + SPAN], k[:, :, :start].transpose(2, 3)) * scale
        mass = torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype).float().mean(1).sum(1)
        distances = range(interval, start - SPAN + 1, interval)
        pairs = torch.stack([mass[:, start - i : start - i + SPAN].sum(1) for i in distances], 1)
        weights = torch.tensor([i / length for i in distances], device=q.device)
        dependencies.append(pairs.std(1) * (pairs * weights).sum(1) * (start / length))
    return torch.stack(dependencies).mean(0)


def published(
    name: str, layer: Callable[[Tensor, Tensor, Tensor, float], Measured], config: Any, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The published way as a function from ids (batch, length) to what each layer's measures are, stacked.

    Args:
        name: "longattn" or "ladm".
        layer: `longattn_layer` or `ladm_layer`.
        config: of the model, which gets random weights; its vocabulary projection is held and not used.
    """
    found: list[Tensor] = []

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out, measured = layer(q, k, v, scaling)
        found.append(measured)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(f"published_{name}", attend)
    AttentionMaskInterface.register(f"published_{name}", lambda **_: None)
    config._attn_implementation = f"published_{name}"
    network = random_network(config, device, torch.float16 if device.type == "cuda" else torch.float32)

    @torch.inference_mode()
    def measure(input_ids: Tensor) -> Tensor:
        found.clear()
        network.model(input_ids, use_cache=False)
        return torch.stack(found)

    return measure
