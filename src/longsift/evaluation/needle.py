"""The needle test: a key is hidden in a long text, and the model is asked for it at the end.

A calculator can only point at far dependencies if it looks back far. Single key ("The pass key is 71432.") and several
keys with names, of which one is asked for; by depth and by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from longsift.errors import UsageError
from longsift.evaluation.controls import draw
from longsift.evaluation.language_model import LanguageModel
from longsift.options import ControlOptions, MeterOptions, ModelOptions, NeedleOptions
from longsift.pieces import load_tokenizer
from longsift.progress import Progress
from longsift.windows import WindowTokenizer

Ids = npt.NDArray[np.int32]

NAMES = "Vienna Lisbon Oslo Madrid Athens Dublin Warsaw Prague Geneva Milan Bergen Naples Porto Seville Tallinn Ghent"
_DIGITS = 5
_TRIES = 40  # random keys for each candidate that is wanted


@dataclass(frozen=True, slots=True)
class Needle:
    """One question.

    Attributes:
        context: the text with the hidden key or keys, up to and including the question, (n,) token ids.
        candidates: the true key's tokens, those of other keys in the text, and of keys that are not, (candidates, k).
    """

    context: Ids
    candidates: Ids


def make_needle(
    filler: Ids,
    tokenizer: WindowTokenizer,
    length: int,
    depth: float,
    *,
    names: int = 1,
    candidates: int = 100,
    chance: Random,
) -> Needle:
    """Hide keys in a text and ask for one of them.

    Args:
        filler: (length,) token ids of a window, special tokens included.
        length: tokens of context and answer together.
        depth: where the asked key lies, from 0 (the beginning) to 1 (just before the question).
        names: keys that are hidden; with more than one, each has a name, and the others lie anywhere.
        candidates: keys among which the true one is to be the likeliest, itself included.
        chance: draws keys, names and the others' places.

    Raises:
        UsageError: no room in the text, or no such number of keys of equally many tokens.
    """
    chosen = chance.sample(NAMES.split(), names) if names > 1 else [""]
    keys = _keys(tokenizer, candidates, chance)
    hidden, answers = [key for key, _ in keys[:names]], [answer for _, answer in keys]
    depths = [depth, *(chance.random() for _ in hidden[1:])]
    needles = []
    for name, key in zip(chosen, hidden, strict=True):
        of = f" of {name}" if name else ""
        needles.append(_encode(tokenizer, f"\nThe pass key{of} is {key}. Remember it. {key} is the pass key{of}.\n"))
    question = _encode(tokenizer, _question(chosen[0]))
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    end = len(filler) - len(tokenizer.suffix)
    body = filler[len(tokenizer.prefix) : end]
    room = length - special - len(question) - len(answers[0]) - sum(map(len, needles))
    if not 0 < room <= len(body):
        raise UsageError(f"A needle test of {length} tokens needs a text of {room} tokens around it; give longer ones.")
    # Cut between tokens of the text; the asked key lies exactly at its depth, whatever lies before it.
    places = sorted((round(at * room), i) for i, at in enumerate(depths))
    pieces, done = [tokenizer.prefix], 0
    for place, i in places:
        pieces += [body[done:place], needles[i]]
        done = place
    pieces += [body[done:room], question]
    return Needle(np.concatenate(pieces), np.stack(answers))


def needle_test(
    inputs: Sequence[str],
    model: ModelOptions = ModelOptions(),
    control: ControlOptions = ControlOptions(),
    meter: MeterOptions = MeterOptions(),
    options: NeedleOptions = NeedleOptions(),
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Ask a language model for keys hidden in documents.

    Args:
        inputs: documents to hide them in.
        control: how they are read and drawn (`per_group`, `groups`, `seed`, …).

    Returns:
        "needle": a row a task, length and depth (and all depths) with "trials", "exact" (share that greedy decoding
        gets right), "first" (share whose true key is the likeliest of all candidates) with its 95 % interval, and
        "rank" (mean rank of the true key, 1 is best).

    Raises:
        InputError, ModelError, UsageError: as reading, loading and making needles do.
    """
    tokenizer = load_tokenizer(model.model or "embedded", model.revision, model.trust_remote_code)
    network = LanguageModel(model, meter)
    lengths, depths = options.numbers("lengths", int), options.numbers("depths", float)
    tasks = {1: "one key", options.keys: f"{options.keys} keys"}
    rows = []
    total = len(tasks) * len(depths) * options.trials * sum(lengths)
    with Progress("needle", total, "tokens", quiet=quiet) as progress:
        for length in lengths:
            fillers = [sample.input_ids for sample in draw(inputs, tokenizer, length, control)]
            for names, task in tasks.items():
                everywhere = []
                for depth in depths:
                    trials = []
                    for trial in range(options.trials):
                        chance = Random(f"{control.seed} {names} {length} {depth} {trial}")
                        filler = chance.choice(fillers)
                        settings: dict[str, Any] = {"names": names, "candidates": options.candidates, "chance": chance}
                        trials.append(_ask(network, make_needle(filler, tokenizer, length, depth, **settings)))
                        progress.advance(length, trials=1)
                    rows.append(_summed(task, length, f"{depth:g}", trials))
                    everywhere += trials
                rows.append(_summed(task, length, "all", everywhere))
    return {"model": network.name, "candidates": options.candidates, "needle": rows}


def _ask(network: LanguageModel, needle: Needle) -> tuple[bool, int]:
    """Whether greedy decoding writes the key, and the key's rank among the candidates (of equals the last)."""
    likelihood, greedy = network.continuations(torch.from_numpy(needle.context), torch.from_numpy(needle.candidates))
    return bool(greedy[0]), int((likelihood >= likelihood[0]).sum())


def _summed(task: str, length: int, depth: str, trials: Sequence[tuple[bool, int]]) -> dict[str, Any]:
    from scipy.stats import binomtest

    first = sum(rank == 1 for _, rank in trials)
    interval = binomtest(first, len(trials)).proportion_ci(method="wilson")
    return {
        "task": task,
        "length": length,
        "depth": depth,
        "trials": len(trials),
        "exact": round(sum(hit for hit, _ in trials) / len(trials), 4),
        "first": round(first / len(trials), 4),
        "low": round(float(interval.low), 4),
        "high": round(float(interval.high), 4),
        "rank": round(sum(rank for _, rank in trials) / len(trials), 2),
    }


def _question(name: str) -> str:
    of = f" of {name}" if name else ""
    return f"\nWhat is the pass key{of}? The pass key{of} is"


def _encode(tokenizer: WindowTokenizer, text: str) -> Ids:
    return tokenizer.encode([text])[0].ids


def _keys(tokenizer: WindowTokenizer, count: int, chance: Random) -> list[tuple[str, Ids]]:
    """Different keys of equally many tokens, and those tokens as they follow the question."""
    stem = _encode(tokenizer, "key is")
    keys: dict[str, Ids] = {}
    size = 0
    for _ in range(count * _TRIES):
        key = str(chance.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
        ids = _encode(tokenizer, f"key is {key}")
        answer = ids[len(stem) :]
        if np.array_equal(ids[: len(stem)], stem) and len(answer) and len(answer) == (size or len(answer)):
            keys[key], size = answer, len(answer)
        if len(keys) == count:
            return list(keys.items())
    raise UsageError(f"The tokenizer has no {count} keys of {_DIGITS} digits with equally many tokens; ask for fewer.")
