"""A small Llama: made, written, read and run with plain causal attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from longsift.errors import InputError
from longsift.shards import write_json
from longsift.tables import publish


def _causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=kwargs.get("scaling"), enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


# Under torch.compile, transformers builds the T×T mask for its own SDPA, which rules out the flash kernel.
CAUSAL = "longsift_causal"
AttentionInterface.register(CAUSAL, _causal_attention)
AttentionMaskInterface.register(CAUSAL, _no_mask)


def new_model(config: Mapping[str, Any], seed: int) -> LlamaForCausalLM:
    """Make a float32 Llama with random weights; what writes to the residual stream starts smaller (GPT-2)."""
    torch.manual_seed(seed)
    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    loaded = AutoConfig.for_model("llama", **settings)
    model = LlamaForCausalLM._from_config(loaded, attn_implementation=CAUSAL, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * config["num_hidden_layers"]) ** -0.5)
    return model


def save_model(model: LlamaForCausalLM, config: Mapping[str, Any], folder: Path) -> None:
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


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each target, (batch, length), for ids and targets (batch, length)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def load_model(folder: Path, device: str = "cpu") -> LlamaForCausalLM:
    """Load a folder written by `train`, in float32 and for the fast causal attention.

    Raises:
        InputError: the folder holds no model.
    """
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no model.safetensors; make one with `train`")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return (
        LlamaForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, dtype=torch.float32, attn_implementation=CAUSAL
        )
        .to(device)
        .eval()
    )
