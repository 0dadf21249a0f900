"""Architectures of small calculators, as the `config.json` that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longsift.errors import InputError

_CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _config(model_type: str, hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": "bfloat16",
        **more,
    }


def hybrid(
    model_type: str,
    *,
    hidden: int = 256,
    intermediate: int = 320,
    layers: int = 12,
    heads: int = 4,
    global_layers: Sequence[int] = (3, 7, 10),
    window: int = 512,
) -> dict[str, Any]:
    """Make a configuration whose layers attend within `window` tokens, but for a few that attend to everything.

    Args:
        model_type: `qwen3`, `smollm3` or `gemma3_text`. All have RoPE in the sliding layers; in the global ones
            `qwen3` has it with the same base, `gemma3_text` with a larger one, `smollm3` has no positions.
        hidden: width; every head has 64.
        intermediate: width of the gated MLP.
        layers: layers in all.
        heads: query heads, over two key-value heads.
        global_layers: the layers, from 0, that attend to everything before.
        window: tokens that a sliding layer attends to, its own included.
    """
    everywhere = [layer in global_layers for layer in range(layers)]
    more: dict[str, Any] = {
        "sliding_window": window,
        "layer_types": ["full_attention" if wide else "sliding_attention" for wide in everywhere],
    }
    if model_type in ("qwen3", "smollm3"):
        more |= {"use_sliding_window": True, "attention_bias": False}
    if model_type == "smollm3":
        more |= {"no_rope_layers": [int(not wide) for wide in everywhere], "mlp_bias": False}
    if model_type == "gemma3_text":
        more |= {"rope_local_base_freq": 10_000.0, "query_pre_attn_scalar": 64, "attention_bias": False}
        more |= {"hidden_activation": "gelu_pytorch_tanh"}
    return _config(model_type, hidden, intermediate, layers, heads, **more)


# "embedded" is the shipped model; the others were compared with it (its card has the log of runs). All but the large
# one fit into the package.
CONFIGS: dict[str, dict[str, Any]] = {
    "embedded": hybrid("smollm3", global_layers=(0, 7, 10)),
    "smollm3": hybrid("smollm3"),
    "qwen3": hybrid("qwen3"),
    "gemma3": hybrid("gemma3_text"),
    "smollm3-large": hybrid("smollm3", hidden=384, intermediate=496, heads=6),
}


def find_config(name: str) -> dict[str, Any]:
    """Give a configuration of `CONFIGS`, or read one from a JSON file.

    Raises:
        InputError: it is neither.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    try:
        config: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is no config.json ({error}); give one, or one of {', '.join(CONFIGS)}") from error
    return config


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a model with this configuration, tied embeddings counted once."""
    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    return sum(weight.numel() for weight in model.parameters())
