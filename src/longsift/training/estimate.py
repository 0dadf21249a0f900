"""What a training would do, from a part of the documents and the speed of this device: `--dry-run`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from longsift.calculators.interface import quiet as hushed
from longsift.errors import InputError
from longsift.progress import Progress
from longsift.sources import find_sources
from longsift.training.calculator import Plan, check_extra, choose_device
from longsift.training.options import TrainOptions
from longsift.training.packing import read_batches
from longsift.training.processes import process_count

_SOURCES = 8  # read from, spread over the corpus
_DOCUMENTS = 500  # read in all
_EFFICIENCY = 0.5  # of a training, against a large matrix product


def estimate_training(inputs: Sequence[str], options: TrainOptions) -> dict[str, Any]:
    """Say how many tokens and steps a training would have and how long a step would take; write nothing.

    A part of a few sources is tokenised, and the rest is taken to be like it, byte for byte. A step's time is that of
    its floating-point operations at half the speed of a large matrix product on this device.

    Raises:
        InputError: no document in the part that was read.
        UsageError, ModelError: as `train_calculator`.
    """
    check_extra()
    device = choose_device(options)
    plan = Plan(options, inputs)
    plan.attention(device)  # refuses what this device cannot have
    sources = find_sources(inputs)
    looked_at = sources[:: -(-len(sources) // _SOURCES)]
    read = 0
    lengths: list[int] = []
    documents = 0
    for source in looked_at:
        with Progress("reading", source.size, "bytes", quiet=True) as progress:
            limit = min(options.limit or _DOCUMENTS, _DOCUMENTS) // len(looked_at) or 1
            for batch in read_batches([source], plan.read, limit, progress, Counter()):
                for _, pieces in plan.cutting.pieces(batch):
                    documents += 1
                    lengths += [len(piece) for piece in pieces]
            read += min(progress.done, source.size)
    if not lengths:
        raise InputError(f"There is nothing to train on in the {len(looked_at)} sources looked at.")
    whole = sum(source.size for source in sources) / max(read, 1)
    if options.limit is not None:
        whole = min(whole, options.limit / documents)
    tokens = round(sum(lengths) * whole)
    steps = plan.steps(max(1, round(tokens / options.window)))
    pairs = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths) * options.window
    with hushed(), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(plan.config, trust_remote_code=options.trust_remote_code)
    flops = window_flops(model, pairs, options.window, options.activation_checkpointing)
    step_tokens = plan.windows_per_step * options.window
    speed = matmul_speed(device, plan.dtype(device)) * _EFFICIENCY * process_count()
    seconds = flops * plan.windows_per_step / speed
    return {
        "documents": round(documents * whole),
        "corpus_tokens": tokens,
        "mean_piece_tokens": float(np.mean(lengths)),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "steps": steps,
        "step_tokens": step_tokens,
        "tokens": steps * step_tokens,
        "passes_over_corpus": steps * step_tokens / max(tokens, 1),
        "accumulated_passes": plan.accumulation,
        "petaflop_a_step": flops * plan.windows_per_step / 1e15,
        "teraflops_assumed": speed / 1e12,
        "seconds_a_step": seconds,
        "hours": seconds * steps / 3600,
        "tokens_per_second": step_tokens / seconds,
        "processes": process_count(),
        "device": str(device),
    }


def window_flops(model: Any, pairs: float, window: int, checkpointing: bool) -> float:
    """Floating-point operations of one window's training.

    Forward, two for every weight of a matrix and token, and four for every pair of tokens, head and dimension; backward
    twice that; once more forward where activations are computed again.

    Args:
        model: on any device; embeddings count once, as the head.
        pairs: of tokens of which one attends to the other; layers with a sliding window are counted by it.
    """
    config = model.config
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    weights = sum(weight.numel() for weight in model.parameters() if weight.ndim >= 2)
    weights -= 0 if head is embedding else embedding.numel()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attended = sum(min(pairs, sliding * window) if kind == "sliding_attention" and sliding else pairs for kind in kinds)
    forward = 2.0 * weights * window + 4.0 * width * attended
    return float(forward * (4 if checkpointing else 3))


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on this device."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the result
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
