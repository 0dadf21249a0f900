"""Tables of a first layer's queries and keys before RoPE, which one kernel looks up and turns to their positions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longsift.calculators import LayerAttention
from longsift.calculators.positions import Turns
from longsift.errors import UnsupportedModel

TURNS_KEPT = 4  # lengths whose cosines and sines are kept; a run has one or two lengths


def kernel_applies(device: torch.device) -> bool:
    """Whether the kernel runs on `device`."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@dataclass(frozen=True, slots=True)
class Layer:
    """What the tables are checked against.

    Attributes:
        turns: what turns the queries and keys of a window of a length; None where it cannot be told.
        sample: (1, n) token ids, repeated tokens among them.
        at: what the layer's own code makes of the sample from a position on.
    """

    turns: Callable[[int], Turns | None]
    sample: Tensor
    at: Callable[[int], LayerAttention]


class TurnedTables:
    """Queries and keys of every token of a vocabulary, before RoPE and after any norm.

    Args:
        q: (vocabulary, heads, head_dim).
        k: (vocabulary, kv_heads, head_dim).
        layer: whose queries and keys they are.
    """

    def __init__(self, q: Tensor, k: Tensor, layer: Layer) -> None:
        self._q, self._k, self._layer = q, k, layer
        self._group = q.shape[1] // k.shape[1]
        self._kept: dict[int, Turns | None] = {}
        self._positions = True
        self._checked = 0  # the longest window of which it is known that the layer is followed

    def follows(self, lengths: Sequence[int]) -> bool:
        """Whether what is looked up is what the layer makes of tokens at the end of windows of these lengths.

        A layer need not use the positions that it is given; if it does not, they are left out from now on.
        """
        self._checked = max(lengths)
        try:
            given = all(self._layer.turns(length) is not None for length in lengths)
            for self._positions in (True, False) if given else (False,):
                self._kept.clear()
                if all(map(self._agrees, lengths)):
                    return True
        except UnsupportedModel:
            pass
        return False

    def look_up(self, input_ids: Tensor, rows: Tensor | None, kv_heads: range) -> tuple[Tensor, Tensor]:
        """Queries (of `rows`) and keys of windows (batch, length), for the given key heads."""
        from longsift.calculators.rotary import look_up

        turns = self._turns(input_ids.shape[1])
        q = self._q[:, kv_heads.start * self._group : kv_heads.stop * self._group]
        return look_up(q, input_ids, turns, rows), look_up(self._k[:, kv_heads.start : kv_heads.stop], input_ids, turns)

    def _turns(self, length: int) -> Turns | None:
        if length not in self._kept:
            while len(self._kept) >= TURNS_KEPT:
                del self._kept[next(iter(self._kept))]
            turns = self._layer.turns(length)  # without positions too, since it looks at the mask
            self._kept[length] = turns if self._positions else None
            if (self._positions and turns is None) or (length > self._checked and not self._agrees(length)):
                del self._kept[length]
                raise UnsupportedModel(
                    f"The first layer does with the positions of windows of {length} tokens what it does not do with "
                    "those of shorter ones. Use another model, or --method ladm, which runs the whole model."
                )
            self._checked = max(self._checked, length)
        return self._kept[length]

    def _agrees(self, length: int) -> bool:
        from longsift.calculators.rotary import look_up

        sample, start = self._layer.sample, length - self._layer.sample.shape[1]
        turns, plain = self._turns(length), self._layer.at(start)
        if turns is not None:
            turns = Turns(turns.cos[start:], turns.sin[start:])
        # The layer rounds each product and sum, the kernel once; in layers of outliers each channel has its own size.
        tolerance = 4 * torch.finfo(plain.q.dtype).eps
        for ours, theirs in ((look_up(self._q, sample, turns), plain.q), (look_up(self._k, sample, turns), plain.k)):
            largest = theirs.abs().amax((0, 2), keepdim=True)
            if not bool(((ours - theirs).abs() <= tolerance * largest).all()):
                return False
        return True
