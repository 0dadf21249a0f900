"""Training windows: random places of the documents, with copies and facts that only far attention can foretell."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from longsift.errors import InputError, UsageError
from longsift.training.corpus import Ids, Packed
from longsift.training.facts import LONGEST, Facts

SLOT = 64  # tokens; a window is ruled into slots, and a slot holds at most one piece of a fact
assert LONGEST <= SLOT
Positions = npt.NDArray[np.int64]


class WindowSampler:
    """Draws training windows; a row depends on the seed, the step and its number alone.

    So a run can be resumed, and several processes can each draw their own rows of a step.

    Attributes:
        tokens: what the positions point into: the documents' tokens, then the facts'.
    """

    def __init__(
        self,
        packed: Packed,
        weights: Mapping[str, float],
        repeat_share: float,
        seed: int,
        recall_share: float = 0.0,
        facts: Facts | None = None,
    ) -> None:
        """Prepare to draw.

        Args:
            packed: the documents.
            weights: factor of a category's chance to be drawn, 1 where not given.
            repeat_share: share of windows that get copied segments.
            seed: of all draws.
            recall_share: share of windows that get facts.
            facts: what is stated and asked there.

        Raises:
            UsageError: a `recall_share` without facts.
        """
        if recall_share > 0 and facts is None:
            raise UsageError("windows with facts need facts; give the tokenizer to make them with")
        self.packed = packed
        self.repeat_share = repeat_share
        self.recall_share = recall_share
        self.seed = seed
        self.facts = facts
        self.tokens: Ids = packed.tokens if facts is None else np.concatenate([packed.tokens, facts.tokens])
        self._factor = np.array([weights.get(group, 1.0) for group in packed.groups])

    def draw(self, step: int, batch: int, length: int, rows: slice = slice(None)) -> Positions:
        """Give positions into `tokens`, (rows, length + 1): inputs and, one further, targets.

        Args:
            step: the step of training.
            batch: windows of the whole step.
            length: tokens of a window.
            rows: which of the `batch` windows to give.

        Raises:
            InputError: no document has `length` + 1 tokens.
            UsageError: windows too short for facts.
        """
        if self.recall_share > 0 and length < 4 * SLOT:
            raise UsageError(f"windows of {length} tokens are too short for facts; use {4 * SLOT} or more")
        chance = np.random.default_rng([self.seed, step])
        starts, ends = self.packed.starts, self.packed.ends
        room = np.maximum(ends - starts - length, 0)  # number of places where a window can begin
        share = room * self._factor
        if share.sum() == 0:
            raise InputError(f"no document has {length + 1} tokens; give longer documents or a shorter --stage")
        documents = chance.choice(len(ends), size=batch, p=share / share.sum())
        begins = starts[documents] + chance.integers(room[documents])
        positions: Positions = begins[rows, None] + np.arange(length + 1)
        for number, row in zip(np.arange(batch)[rows], positions, strict=True):  # a view: what is written stays
            own = np.random.default_rng([self.seed, step, int(number) + 1])
            if own.random() < self.repeat_share:
                add_copies(row, own)
            if self.facts is not None and own.random() < self.recall_share:
                add_facts(row, self.facts, len(self.packed.tokens), own)
        return positions


def _far_or_near(chance: np.random.Generator, least: int, most: int) -> int:
    # Half of the distances are uniform, half of them uniform in their logarithm: the near ones are learnt first.
    if chance.random() < 0.5:
        return int(chance.integers(least, most + 1))
    return int(least * ((most + 1) / least) ** chance.random())


def add_copies(row: Positions, chance: np.random.Generator) -> None:
    """Replace one to eight segments of a window by copies of what stands anywhere before them, in place.

    Args:
        row: positions of one window, (length + 1,), at least 16.
        chance: random numbers. Sizes are log-uniform from 8 tokens to a sixteenth of the window.
    """
    largest = max(8, len(row) // 16)
    for size in 8 * (largest / 8) ** chance.random(int(chance.integers(1, 9))):
        segment = int(size)
        distance = _far_or_near(chance, segment, len(row) - segment)
        target = int(chance.integers(distance, len(row) - segment + 1))
        row[target : target + segment] = row[target - distance : target - distance + segment]


def add_facts(row: Positions, facts: Facts, offset: int, chance: np.random.Generator) -> None:
    """State facts in a window and ask for each once or more further on, in place.

    Args:
        row: positions of one window, (length + 1,), at least four slots long.
        facts: what to state; in half of the windows all are worded alike.
        offset: position of the first token of `facts`.
        chance: random numbers. There are up to 64 facts, at most one for every four slots.
    """
    slots = len(row) // SLOT
    most = min(64, slots // 4)
    first, end = facts.kinds[int(chance.integers(len(facts.kinds)))] if chance.random() < 0.5 else (0, len(facts.spans))
    number = min(int(chance.integers(min(8, most), most + 1)), end - first)
    chosen = chance.choice(end - first, size=number, replace=False) + first
    free = np.ones(slots, dtype=bool)

    def put(slot: int, start: int, size: int) -> None:
        place = slot * SLOT + int(chance.integers(SLOT - size + 1))
        row[place : place + size] = np.arange(offset + start, offset + start + size)
        free[slot] = False

    for fact in facts.spans[chosen].tolist():
        stated = int(chance.integers(slots - 1))
        if not free[stated]:
            continue
        asked = 0
        for _ in range(int(chance.integers(2, 6))):  # some of the tries find their slot taken
            slot = stated + _far_or_near(chance, 1, slots - 1 - stated)
            if free[slot]:
                put(slot, *fact[1 + int(chance.integers(2))])
                asked += 1
        if asked:
            put(stated, *fact[0])
