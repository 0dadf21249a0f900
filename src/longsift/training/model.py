"""A small causal language model, plain or hybrid: made, written, read and run fast.

Any transformers causal model serves whose attention goes through the attention interface and whose layers attend
causally, to everything before (`full_attention`) or to the nearest `sliding_window` tokens (`sliding_attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from longsift.errors import InputError
from longsift.shards import write_json
from longsift.tables import publish

Losses = Callable[[PreTrainedModel, torch.Tensor, torch.Tensor], torch.Tensor]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask | None = None,
    *_: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    # Query and key norms multiply by float32 weights, so under autocast only the values are still in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if mask is not None:
        out = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    elif sliding_window is not None and sliding_window < query.shape[2]:
        out = _sliding_attention(query, key, value, sliding_window, scaling)
    else:
        # Key-value heads are repeated: in float32 on CUDA, grouped ones would leave only the kernel that holds T×T.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _sliding_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scaling: float | None
) -> torch.Tensor:
    # A block of queries at a time: memory and work grow with the length, not with its square.
    length = query.shape[2]
    blocks = []
    for begin in range(0, length, window):
        end, first = min(begin + window, length), max(0, begin - window + 1)
        distance = torch.arange(begin, end, device=query.device)[:, None] - torch.arange(
            first, end, device=query.device
        )
        blocks.append(
            F.scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=(distance >= 0) & (distance < window),
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(blocks, dim=2)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


# Under torch.compile, transformers builds the T×T mask for its own SDPA, which rules out the flash kernel.
ATTENTION = "longsift_causal"
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def _from_config(config: PretrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=ATTENTION, dtype=torch.float32
    )
    return model


def new_model(config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """Make a float32 model of `config["model_type"]` with random weights.

    What a layer adds to the residual stream starts smaller, as in GPT-2: by its output matrices, or by the norms
    after them where there are such (EXAONE 4, Gemma 3).
    """
    torch.manual_seed(seed)
    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    model = _from_config(AutoConfig.for_model(config["model_type"], **settings))
    shrink = (2 * config["num_hidden_layers"]) ** -0.5
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(shrink)
    for layer in model.model.layers:
        if hasattr(layer, "post_feedforward_layernorm"):  # norms that follow: their gain is the weight, or 1 + weight
            layer.post_attention_layernorm.weight.data.add_(shrink - 1)
            layer.post_feedforward_layernorm.weight.data.add_(shrink - 1)
    return model


def save_model(model: PreTrainedModel, config: Mapping[str, Any], folder: Path) -> None:
    """Write `config.json` and bfloat16 `model.safetensors`; the tied output matrix is written once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    with publish(folder / "model.safetensors") as path:
        save_file(weights, path, metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def load_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """Load a folder written by `train`, in float32 and for the fast causal attention.

    Raises:
        InputError: the folder holds no model.
    """
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no model.safetensors; make one with `train`")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation=ATTENTION
    )
    return model.to(device).eval()


def _cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def token_losses(model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each target, (batch, length), for ids and targets (batch, length)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return _cross_entropy(hidden, model.lm_head.weight, targets)


@functools.lru_cache(maxsize=16)
def _block_mask(length: int, window: int, device: torch.device) -> BlockMask:
    def near(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key > query - window)

    return create_block_mask(near, None, None, length, length, device=str(device))


def compiled_losses(model: PreTrainedModel) -> Losses:
    """Give a faster `token_losses` for this model: compiled, on CUDA with sliding layers in FlexAttention.

    Layers are compiled one by one: those of a kind share one compilation a window length. The model itself is
    changed: its layers stay compiled.
    """
    torch._dynamo.config.recompile_limit = 64  # two kinds of layer, several lengths
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    cross_entropy = torch.compile(_cross_entropy, dynamic=False)
    sliding = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())

    def losses(model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        masks: dict[str, BlockMask | None] | None = None
        if sliding and ids.is_cuda:  # FlexAttention has no backward on a CPU
            near = _block_mask(ids.shape[1], model.config.sliding_window, ids.device)
            masks = {"full_attention": None, "sliding_attention": near}
        hidden = model.model(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
        result: torch.Tensor = cross_entropy(hidden, model.lm_head.weight, targets)
        return result

    return losses
