"""Loss by position: whether a language model still gains from text that is further and further away."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from longsift.evaluation.controls import draw
from longsift.evaluation.language_model import LanguageModel
from longsift.options import ControlOptions, MeterOptions, ModelOptions
from longsift.pieces import load_tokenizer
from longsift.progress import Progress

_FIRST = 256  # tokens in the first bucket; each next one ends at twice the position


def perplexity(
    inputs: Sequence[str],
    model: ModelOptions = ModelOptions(),
    control: ControlOptions = ControlOptions(),
    meter: MeterOptions = MeterOptions(),
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Loss of windows of documents, by group and by position in the window.

    Args:
        inputs: documents.
        control: how they are read and drawn, and how long a window is.

    Returns:
        "perplexity": a row a group (and all groups) and stretch of positions with "from" and "to" (tokens before the
        predicted one, "to" left out), "windows", "loss" in nats a token, "error" (its standard error over documents)
        and "perplexity".

    Raises:
        InputError, ModelError, UsageError: as reading and loading do.
    """
    tokenizer = load_tokenizer(model.model or "embedded", model.revision, model.trust_remote_code)
    samples = [s for s in draw(inputs, tokenizer, control.window, control) if s.kind == "coherent"]
    network = LanguageModel(model, meter)
    edges = buckets(control.window)
    by_document: dict[str, dict[str, list[list[float]]]] = {}
    with Progress("perplexity", len(samples) * control.window, "tokens", quiet=quiet) as progress:
        for sample in samples:
            losses = network.losses(torch.from_numpy(sample.input_ids)).double().numpy()
            means = [float(losses[low - 1 : high - 1].mean()) for low, high in edges]
            by_document.setdefault(sample.group, {}).setdefault(sample.doc_id, []).append(means)
            progress.advance(control.window, windows=1)
    rows = []
    everything = {f"{group}/{doc}": found for group, docs in by_document.items() for doc, found in docs.items()}
    for group, documents in (*by_document.items(), ("all", everything)):
        averages = np.array([np.mean(found, axis=0) for found in documents.values()])
        for i, (low, high) in enumerate(edges):
            loss = averages[:, i].mean()
            error = averages[:, i].std(ddof=1) / math.sqrt(len(averages)) if len(averages) > 1 else None
            rows.append(
                {
                    "group": group,
                    "from": low,
                    "to": high,
                    "windows": sum(map(len, documents.values())),
                    "loss": round(float(loss), 4),
                    "error": None if error is None else round(float(error), 4),
                    "perplexity": round(math.exp(loss), 3),
                }
            )
    return {"model": network.name, "window": control.window, "perplexity": rows}


def buckets(length: int) -> list[tuple[int, int]]:
    """Stretches of positions, [from, to), from 1 to `length`: the first of 256 tokens, each next one to twice that.

    >>> buckets(1000)
    [(1, 256), (256, 512), (512, 1000)]
    """
    edges = [1, min(_FIRST, length)]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return list(itertools.pairwise(edges))
