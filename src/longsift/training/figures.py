"""Figures of a small causal language model: how well it predicts, and what it gets from far context."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from longsift.errors import InputError
from longsift.training.corpus import Ids, Packed
from longsift.training.model import token_losses


@torch.inference_mode()
def _losses(model: PreTrainedModel, windows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    # (n, length) ids -> (n, length - 1) nats, one window at a time: a window's loss has no neighbours.
    rows = []
    for window in windows:
        ids = torch.from_numpy(window.astype(np.int64)).to(model.device)[None]
        rows.append(token_losses(model, ids[:, :-1], ids[:, 1:])[0].double().cpu().numpy())
    return np.stack(rows)


def cut_windows(packed: Packed, length: int, per_group: int) -> dict[str, Ids]:
    """Give each category up to `per_group` disjoint windows, (n, length), spread evenly over its documents."""
    found: dict[str, list[Ids]] = {}
    for start, end, group in zip(packed.starts, packed.ends, packed.groups, strict=True):
        for begin in range(start, end - length + 1, length):
            found.setdefault(group, []).append(packed.tokens[begin : begin + length])
    picked = {}
    for group, windows in sorted(found.items()):
        places = np.linspace(0, len(windows) - 1, min(per_group, len(windows))).round().astype(int)
        picked[group] = np.stack([windows[place] for place in places])
    return picked


def copy_losses(
    model: PreTrainedModel, windows: Ids, segment: int, distance: int, seed: int, from_text: bool
) -> tuple[float, float]:
    """Put one segment into each window twice, `distance` tokens apart, and give its two losses in nats a token.

    Args:
        model: a causal language model.
        windows: (n, length) ids with segment + distance < length; n > 1 when `from_text`.
        segment: tokens of the segment.
        distance: tokens between the starts of its two occurrences.
        seed: of the random places and tokens.
        from_text: take the segment from the next window, else draw its tokens uniformly from the vocabulary.

    Returns:
        Mean loss over the first occurrence and over the second.
    """
    chance = np.random.default_rng(seed)
    changed = windows.copy()
    first, second = [], []
    places = chance.integers(1, windows.shape[1] - distance - segment, size=len(windows))
    for row, place in enumerate(places):
        donor = windows[(row + 1) % len(windows)]
        piece = (
            donor[place : place + segment] if from_text else chance.integers(1, model.config.vocab_size, size=segment)
        )
        changed[row, place : place + segment] = piece
        changed[row, place + distance : place + distance + segment] = piece
    for loss, place in zip(_losses(model, changed), places, strict=True):
        # Column t is the loss of token t + 1; a segment's own first token cannot be foretold, so it is left out.
        first.append(loss[place : place + segment - 1].mean())
        second.append(loss[place + distance : place + distance + segment - 1].mean())
    return float(np.mean(first)), float(np.mean(second))


def evaluate(
    model: PreTrainedModel, packed: Packed, length: int = 8192, per_group: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Measure what a model gets from far context.

    Args:
        model: a causal language model.
        packed: documents it was not trained on.
        length: window length in tokens.
        per_group: at most so many windows a category.
        seed: of the copy test.

    Returns:
        For every category: `windows`; `bits_per_byte`; `loss_at`, nats a token by position in the window; and
        `loss_last`, nats a token over the last eighth of the window with `full` context and with only the eighth
        before it (`short`), the same tokens in both. Under `copy`: losses of a segment's first and second occurrence.
    """
    windows = cut_windows(packed, length, per_group)
    if not windows:
        raise InputError(f"no document has {length} tokens; give longer documents or a smaller --length")
    edges = [0, *(length >> shift for shift in (5, 4, 3, 2, 1)), length - 1]
    eighth = length // 8
    result: dict[str, Any] = {"length": length, "groups": {}, "copy": {}}
    for group, rows in windows.items():
        losses = _losses(model, rows)
        short = _losses(model, rows[:, -2 * eighth :])
        at = {f"{a}-{b}": float(losses[:, a:b].mean()) for a, b in itertools.pairwise(edges)}
        result["groups"][group] = {
            "windows": len(rows),
            "bits_per_byte": float(losses.sum() / math.log(2) / packed.token_bytes[rows[:, 1:]].sum()),
            "loss_at": at,
            "loss_last": {
                "full": float(losses[:, -eighth:].mean()),
                "short": float(short[:, -eighth:].mean()),
            },
        }
    every = np.concatenate([rows[:8] for rows in windows.values()])
    for name, from_text in (("random", False), ("text", True)):
        first, second = copy_losses(model, every, length // 32, length // 2, seed, from_text)
        result["copy"][name] = {"first": first, "second": second, "distance": length // 2}
    return result
