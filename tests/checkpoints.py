"""Small checkpoints with random weights, one a family of architectures, for tests that need a real model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 160

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What each family adds, and what it is here to try.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # frequencies scaled by the llama3 rule
    "llama": (
        "LlamaConfig",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    # biases of q and k
    "qwen2": ("Qwen2Config", {}),
    # norms of q and k, by head
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    # every layer slides
    "mistral-sliding": ("MistralConfig", {"sliding_window": 48}),
    # soft cap, scaled embedding, odd layers global
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 48, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    # two RoPE bases, one layer in three global
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 48,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    # no input norm; norms of the whole q and k
    "olmo2": ("Olmo2Config", {}),
    # layers without positions
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1], "use_sliding_window": False}),
    # a scale of its own, scaled embedding
    "granite": ("GraniteConfig", {"attention_multiplier": 0.11, "embedding_multiplier": 3.0}),
    # q, k and v in one projection, part of a head rotated
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    # interleaved RoPE, no norm weights on the way
    "cohere": ("CohereConfig", {"use_qk_norm": True}),
    # a mixture of experts after the attention
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
}


def make_config(family: str, *, layers: int = 3, **changes: Any) -> Any:
    """The transformers configuration of a small model of `family`; `changes` win."""
    name, own = FAMILIES[family]
    values = {**_COMMON, "num_hidden_layers": layers, **copy.deepcopy(own), **changes}  # configs keep and fill dicts
    for key, entries in values.items():
        if key in ("layer_types", "no_rope_layers"):
            values[key] = [entries[i % len(entries)] for i in range(layers)]
    if family in ("cohere", "granite", "olmo2", "olmoe", "phi3", "qwen2", "smollm3"):
        values.pop("head_dim")  # hidden_size / heads, the same number
    return getattr(transformers, name)(**values)


def make_checkpoint(folder: Path, family: str, *, layers: int = 3, sharded: bool = False, **changes: Any) -> Path:
    """Write a random-weight checkpoint of `family` to `folder`: the same weights each time.

    Args:
        folder: is made.
        family: a key of `FAMILIES`.
        layers: decoder layers.
        sharded: several files with an index, as large models have.
        changes: fields of its configuration.
    """
    config = make_config(family, layers=layers, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases begin as ones and zeros, which would hide their absence
                    parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    return folder


def make_unsupported(folder: Path) -> Path:
    """A checkpoint of an architecture that does not let its attention be observed (ALiBi inside the module)."""
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
