"""The shapes that are measured, checkpoints of these shapes with random weights, and text for them.

The time of a measure does not depend on the values of the weights, and neither does its memory.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import save_file

from longsift.calculators.checkpoint import EMBEDDED


@dataclass(frozen=True)
class Layer:
    """The attention of one layer."""

    title: str
    heads: int
    kv_heads: int
    head_dim: int

    def queries_keys(
        self, length: int, seed: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random q (1, heads, length, head_dim) and k (1, kv_heads, length, head_dim)."""
        generator = torch.Generator(device).manual_seed(seed)
        q, k = (
            torch.randn(1, heads, length, self.head_dim, generator=generator, device=device, dtype=dtype)
            for heads in (self.heads, self.kv_heads)
        )
        return q, k


LAYERS = {
    "longattn-8b": Layer("Llama-3.1-8B, first layer", 32, 8, 128),
    "longattn-70b": Layer("Llama-3.1-70B, first layer", 64, 8, 128),
    "tinyllama": Layer("TinyLlama-1.1B, a layer", 32, 4, 64),
    "smollm2": Layer("SmolLM2-135M, a layer", 9, 3, 64),
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "llama-3.1-70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}

# What --quick changes, for runs that only show that a program works.
QUICK = {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

SHORTEST, LONGEST = 150_000, 2_000_000  # characters of a document


def model_config(name: str, *, quick: bool = False, **changes: Any) -> Any:
    """The transformers configuration of a model of `MODELS`."""
    values = json.loads(json.dumps(MODELS[name]))  # configurations keep and fill the dicts that they are given
    return transformers.LlamaConfig(**{**values, **(QUICK if quick else {}), **changes})


def random_checkpoint(
    folder: Path,
    name: str,
    device: torch.device,
    *,
    first_layer: bool = False,
    quick: bool = False,
    tokenizer: Path = EMBEDDED,
) -> Path:
    """Write a checkpoint of a model's shape with random weights, in bfloat16.

    Args:
        folder: is made.
        name: a key of `MODELS`.
        device: where the weights are drawn.
        first_layer: only the four tensors that LongAttn's calculator reads; the rest of the model is not there.
        quick: a tiny model in its place.
        tokenizer: folder of the tokenizer, whose ids must be in the vocabulary.
    """
    config = model_config(name, quick=quick)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    if first_layer:
        config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
        config.save_pretrained(folder)
        save_file(_first_layer_tensors(config, device), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        transformers.utils.logging.disable_progress_bar()
        random_network(config, device, torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / file)
    return folder


def random_network(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal language model of `config` with random weights, drawn on the device."""
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def _first_layer_tensors(config: Any, device: torch.device) -> dict[str, torch.Tensor]:
    width, head_dim = config.hidden_size, config.head_dim
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.layers.0.self_attn.q_proj.weight": (config.num_attention_heads * head_dim, width),
        "model.layers.0.self_attn.k_proj.weight": (config.num_key_value_heads * head_dim, width),
    }
    tensors = {
        key: (torch.randn(*shape, device=device, dtype=torch.bfloat16) * config.initializer_range).cpu()
        for key, shape in shapes.items()
    }
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(width, dtype=torch.bfloat16)
    return tensors


def random_windows(number: int, length: int, vocabulary: int) -> list[npt.NDArray[np.int32]]:
    """Windows of ids drawn evenly from the vocabulary: no table row is met more often than others."""
    generator = np.random.default_rng(0)
    return [generator.integers(4, vocabulary, length, dtype=np.int32) for _ in range(number)]


def library_documents(characters: int) -> Iterator[dict[str, str]]:
    """Documents of the sources of the standard library and of the installed packages, so many characters in all.

    A document is a package's files in path order, cut where it grows too long; small packages share one. Where the
    sources do not suffice they come again, cut at other places.
    """
    written = 0
    for number, (source, text) in enumerate(_sources()):
        text = text[: characters - written]
        yield {"id": str(number), "text": text, "source": source}
        written += len(text)
        if written >= characters:
            return


def _sources() -> Iterator[tuple[str, str]]:
    """Packages and their texts, again and again."""
    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    folders = [folder for root in roots for folder in sorted(root.iterdir()) if folder.is_dir()]
    held = ""
    for longest in count(LONGEST, -997):
        for folder in folders:
            if folder.name in ("site-packages", "dist-packages"):
                continue
            for file in sorted(folder.rglob("*.py")):
                held += f"# {file.relative_to(folder.parent)}\n" + file.read_text("utf-8", "replace")
                while len(held) >= longest:
                    yield folder.name, held[:longest]
                    held = held[longest:]
            if len(held) >= SHORTEST:
                yield folder.name, held
                held = ""


def write_corpus(folder: Path, characters: int, files: int) -> int:
    """Write `library_documents` as JSON lines; returns their bytes."""
    folder.mkdir(parents=True)
    rows: list[list[str]] = [[] for _ in range(files)]
    for i, document in enumerate(library_documents(characters)):
        rows[i % files].append(json.dumps(document, ensure_ascii=False) + "\n")
    for i, lines in enumerate(rows):
        (folder / f"{i}.jsonl").write_text("".join(lines), encoding="utf-8")
    return sum(file.stat().st_size for file in folder.iterdir())
