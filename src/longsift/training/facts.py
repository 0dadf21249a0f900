"""Small facts to be stated in one place of a window and asked for in another: what far attention is for."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tokenizers

from longsift.training.corpus import Ids

LONGEST = 56  # tokens of a piece; longer ones are left out

# A statement and ways to ask for its last word: every way ends with the value, which only the statement tells.
_TEMPLATES: tuple[tuple[str, ...], ...] = (
    ("The {thing} of {name} is {value}.", "The {thing} of {name} is {value}.", "{name}'s {thing} is {value}."),
    ("The {thing} of {name} is {value}.", "What is the {thing} of {name}? It is {value}."),
    ("{name} has the {thing} {value}.", "{name} has the {thing} {value}.", "Which {thing} has {name}? {value}."),
    ("Remember that the {name} {thing} is {value}. {value} is the {thing}.", "The {name} {thing} is {value}."),
    ("Note: {thing} for {name}: {value}", "{thing} for {name}: {value}", "Q: {thing} for {name}? A: {value}"),
    ("{name}_{thing} = {value}", "{name}_{thing} = {value}", "print({name}_{thing})  # {value}"),
    ('{{"{thing}": "{name}", "id": "{value}"}}', '"{thing}": "{name}", "id": "{value}"', "{thing} {name} -> {value}"),
    ("{name}, see {thing} {value}", "{name}, see {thing} {value}", "\\cite{{{name}}} {thing} {value}"),
    ("{value} was written on the {thing} of {name}.", "On the {thing} of {name} was written: {value}."),
    ("{name} {value}", "{name} {value}", "{name}: {value}"),
)
# Lists of words, written as lines to be read.
_THINGS = (  # noqa: SIM905
    "number code price weight height age colour address room score name door ticket shelf page mark answer secret "
    "token label account station date flight locker seat file depth temperature island book owner guest password key "
    "river street ship horse medicine letter case chapter order port index error limit size rate level version volume"
).split()
_HEADS = "b bl br c ch cl d dr f fl g gr h j k kr l m n p pl pr qu r s sh sk st t th tr v w z".split()  # noqa: SIM905
_VOWELS = "a e i o u ai ea io ou".split()  # noqa: SIM905
_TAILS = ["", "", "", "n", "r", "s", "l", "m", "t", "nd", "rk", "st", "x"]


def _word(chance: random.Random) -> str:
    syllables = chance.choice((2, 2, 3))
    return "".join(
        chance.choice(_HEADS) + chance.choice(_VOWELS) + (chance.choice(_TAILS) if last == syllables else "")
        for last in range(1, syllables + 1)
    )


def _value(chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.5:
        return "".join(chance.choices("0123456789", k=chance.randint(2, 8)))
    if kind < 0.6:
        return "".join(chance.choices("0123456789abcdef", k=chance.randint(4, 8)))
    if kind < 0.8:
        return _word(chance)
    return f"{_word(chance)} {chance.choice(_THINGS)}"


@dataclass(frozen=True, slots=True)
class Facts:
    """Tokenised facts.

    Attributes:
        tokens: ids of all pieces end to end, (total,).
        spans: start and length of each piece in `tokens`, (facts, 3, 2): the statement and two ways to ask.
        kinds: facts that are worded alike, as (first, end) of each wording; facts of one wording lie together.
    """

    tokens: Ids
    spans: npt.NDArray[np.int64]
    kinds: tuple[tuple[int, int], ...]


def make_facts(tokenizer: tokenizers.Tokenizer, count: int = 20_000, seed: int = 0) -> Facts:
    """Make about `count` facts about invented names, in ten wordings.

    A fact whose statement or question is longer than `LONGEST` tokens is left out.
    """
    chance = random.Random(seed)
    pieces: list[list[int]] = []
    kinds = []
    for template in _TEMPLATES:
        texts = []
        for _ in range(count // len(_TEMPLATES)):
            name = _word(chance)
            name = chance.choice((name, name.capitalize(), f"{name.capitalize()} {_word(chance).capitalize()}"))
            filled = {"name": name, "thing": chance.choice(_THINGS), "value": _value(chance)}
            before = chance.choice(("\n", "\n", " ", "\n\n"))
            for wording in (template[0], template[1], template[-1]):
                texts.append(before + wording.format(**filled) + before)
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        facts = [encoded[first : first + 3] for first in range(0, len(encoded), 3)]
        short = [fact for fact in facts if max(map(len, fact)) <= LONGEST]
        kinds.append((len(pieces) // 3, len(pieces) // 3 + len(short)))
        pieces += [piece for fact in short for piece in fact]
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    spans = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).reshape(-1, 3, 2)
    tokens = np.concatenate([np.array(piece, dtype=np.uint16) for piece in pieces])
    return Facts(tokens, spans, tuple(kind for kind in kinds if kind[0] < kind[1]))
