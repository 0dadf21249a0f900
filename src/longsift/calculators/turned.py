"""Tables of a first layer's queries and keys before RoPE, which one kernel looks up and turns to their positions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from longsift.calculators import LayerAttention
from longsift.calculators.positions import Turns
from longsift.errors import UnsupportedModel

TURNS_KEPT = 4  # lengths whose cosines and sines are kept; a run has one or two lengths


def kernel_applies(device: torch.device) -> bool:
    """Whether the kernel runs on `device`."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class TurnedTables:
    """Queries and keys of every token of a vocabulary, before RoPE and after any norm.

    Args:
        q: (vocabulary, heads, head_dim).
        k: (vocabulary, kv_heads, head_dim).
        read_turns: what turns the queries and keys of a window of a length; None where it cannot be told.
    """

    def __init__(self, q: Tensor, k: Tensor, read_turns: Callable[[int], Turns | None]) -> None:
        self._q, self._k, self._read_turns = q, k, read_turns
        self._group = q.shape[1] // k.shape[1]
        self._kept: dict[int, Turns | None] = {}
        self._positions = True

    def follows(self, input_ids: Tensor, plain: LayerAttention) -> bool:
        """Whether what is looked up for `input_ids` is what the plain layer made of them, to a few roundings.

        A layer need not use the positions that it is given; if it does not, they are left out from now on.
        """
        try:
            self._positions = self._read_turns(input_ids.shape[1]) is not None
        except UnsupportedModel:
            return False
        if self._positions and self._agrees(input_ids, plain):
            return True
        self._kept.clear()
        self._positions = False
        return self._agrees(input_ids, plain)

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
            turns = self._read_turns(length)  # without positions too, since it looks at the mask
            if self._positions and turns is None:
                raise UnsupportedModel(f"The first layer turns windows of {length} tokens in another way than others.")
            self._kept[length] = turns if self._positions else None
        return self._kept[length]

    def _agrees(self, input_ids: Tensor, plain: LayerAttention) -> bool:
        # The layer rounds each product and sum, the kernel once; in layers of outliers each channel has its own size.
        tolerance = 4 * torch.finfo(plain.q.dtype).eps
        q, k = self.look_up(input_ids, None, range(self._k.shape[1]))
        for ours, theirs in ((q, plain.q), (k, plain.k)):
            largest = theirs.abs().amax((0, 2), keepdim=True)
            if not bool(((ours - theirs).abs() <= tolerance * largest).all()):
                return False
        return True
