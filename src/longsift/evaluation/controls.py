"""Coherent windows, and controls that hold the same text without what holds it together over a distance.

A score of long-range dependency must put windows of real documents above windows that were made from the same
tokens by taking them apart; nobody has to label anything. Each kind of control takes away something else:

- `mixed`: at each segment position the segments are exchanged between documents of one group. Every segment keeps
  its position, and the set as a whole its tokens; only what connects segments is gone.
- `shuffled`: a document's own segments in another order: the topic stays, the order goes.
- `far-half`: the first half of a window comes from another document, so that the second half has a past that is
  not its own.
- `pieces`: short pieces of many documents of a group, from any place: long text that was only joined.
- `degenerate/<name>`: text that was generated (`longsift.evaluation.degenerate`), and `degenerate/shuffled-tokens`,
  the tokens of a window in random order.

Documents are split into folds first, and no control mixes documents of two folds; so what is fitted on some folds
can be tested on the controls of the others.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from longsift.documents import BadRow, Document, ReadOptions, find_sources, read_documents
from longsift.errors import InputError, UsageError
from longsift.evaluation import degenerate
from longsift.options import ControlOptions
from longsift.windows import WindowTokenizer, sample_key

log = logging.getLogger(__name__)

_PLAIN = ReadOptions()

Ids = npt.NDArray[np.int32]

SHUFFLED_TOKENS = "degenerate/shuffled-tokens"
DEGENERATE = (*(f"degenerate/{name}" for name in degenerate.KINDS), SHUFFLED_TOKENS)
PAIRED = ("mixed", "shuffled", "far-half", "pieces")
KINDS = (*PAIRED, *DEGENERATE)
"""Every kind of control that `build_controls` makes; the name "degenerate" stands for all of `DEGENERATE`."""

_SHORTEST_PIECE = 64
_MOST_CHARACTERS = 64  # of degenerate text a token: a tokenizer that makes fewer tokens of it is refused


@dataclass(frozen=True, slots=True)
class Sample:
    """One window to measure, coherent or control.

    Attributes:
        kind: "coherent", one of `KINDS`, or "natural/<group>" for a control that the corpus itself holds.
        group: the group with whose coherent windows it is compared; "" compares it with every group.
        doc_id: its document; of a control the one that its first tokens are from.
        fold: of its document.
        input_ids: (length,), special tokens included.
    """

    kind: str
    group: str
    doc_id: str
    fold: int
    input_ids: Ids

    @property
    def key(self) -> str:
        """Tells samples apart by what they hold, so that a measurement can be found again."""
        digest = hashlib.blake2b(self.input_ids.astype("<i4").tobytes(), digest_size=12)
        digest.update(f"{self.kind}\0{self.group}\0{self.doc_id}\0{self.fold}".encode())
        return digest.hexdigest()


def draw_coherent(
    inputs: Sequence[str],
    tokenizer: WindowTokenizer,
    length: int,
    *,
    per_group: int,
    per_document: int = 1,
    folds: int = 4,
    seed: int = 0,
    options: ReadOptions = _PLAIN,
    groups: Sequence[str] | None = None,
    control_groups: Sequence[str] = (),
    limit: int | None = None,
) -> list[Sample]:
    """Draw windows of real documents: documents at random in each group, and a random place in each document.

    The draw depends on the documents' ids and the seed, not on their order or on how they are spread over files.
    Only documents that are still in the draw are tokenised, and only drawn windows are held.

    Args:
        inputs: files, folders, globs or urls of documents, or one run folder with a windows table; there the place
            in a document is one of its windows of exactly `length` tokens.
        tokenizer: of the model that will measure.
        length: tokens of a window, special tokens included; shorter documents are left out.
        per_group: documents drawn in each group; fewer where a group has not so many.
        per_document: windows of a document at most; they do not overlap.
        folds: into which documents are split by a hash of their ids.
        seed: of the draw.
        options: how rows become documents.
        groups: the groups that coherent windows are drawn from; default all that are not `control_groups`.
        control_groups: groups that hold no long-range dependency: they are drawn as "natural/<group>".
        limit: documents read at most.

    Returns:
        Samples of kind "coherent" and "natural/<group>", ordered by group and then at random.

    Raises:
        InputError: nothing to read, or no document is long enough.
        UsageError: numbers that cannot work.
    """
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    if length <= special or min(per_group, per_document, folds) < 1:
        raise UsageError("--window must have room for text, and --per-group, --per-document and --folds be at least 1.")
    drawn: dict[str, _Draw] = defaultdict(lambda: _Draw(per_group))
    too_short = bad = 0
    for row in _read(inputs, options, limit):
        if isinstance(row, BadRow):
            bad += 1
        elif groups is None or row.group in groups or row.group in control_groups:
            key = sample_key(row.doc_id, seed)
            if drawn[row.group].wants(row.doc_id, key):
                windows = _windows_of(row, tokenizer, length, per_document, seed)
                drawn[row.group].offer(row.doc_id, key, windows, per_document, seed)
                too_short += not windows
    if bad:
        log.warning("%d rows could not be read and were left out", bad)
    samples = []
    for group in sorted(drawn):
        kind, compared = (f"natural/{group}", "") if group in control_groups else ("coherent", group)
        for doc_id, windows in drawn[group].documents():
            samples += [Sample(kind, compared, doc_id, fold_of(doc_id, folds), ids) for ids in windows]
        if (count := len(drawn[group].documents())) < per_group:
            log.warning("group '%s' has %d documents of %d tokens, not %d", group, count, length, per_group)
    if not any(sample.kind == "coherent" for sample in samples):
        raise InputError(
            f"No document has {length} tokens ({too_short} were too short, {bad} could not be read). "
            "Give longer documents or a shorter --window."
        )
    return samples


def draw(
    inputs: Sequence[str], tokenizer: WindowTokenizer, length: int, options: ControlOptions, folds: int = 1
) -> list[Sample]:
    """`draw_coherent` as the command line's options say."""
    return draw_coherent(
        inputs,
        tokenizer,
        length,
        per_group=options.per_group,
        per_document=options.per_document,
        folds=folds,
        seed=options.seed,
        options=ReadOptions(text_key=options.text_key, id_key=options.id_key, group_by=options.group_by),
        groups=options.names("groups"),
        control_groups=options.names("control_groups") or (),
        limit=options.limit,
    )


def fold_of(doc_id: str, folds: int) -> int:
    """The fold of a document: the same in every draw, whatever the seed, the length and the corpus."""
    return sample_key(f"fold {doc_id}", 0) % folds


class _Draw:
    """The documents with the smallest keys of a stream, and their windows."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, str]] = []  # (negated key, document); the first has the largest key
        self._windows: dict[str, list[Ids]] = {}

    def wants(self, doc_id: str, key: int) -> bool:
        full = len(self._heap) == self._size
        return doc_id in self._windows or not full or key < -self._heap[0][0]

    def offer(self, doc_id: str, key: int, windows: list[Ids], per_document: int, seed: int) -> None:
        """Add a document's windows; rows of one document (a windows table) come one by one."""
        if not windows:
            return
        if doc_id in self._windows:
            both = self._windows[doc_id] + windows
            self._windows[doc_id] = sorted(both, key=lambda ids: sample_key(_text_of(ids), seed))[:per_document]
            return
        self._windows[doc_id] = windows
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (-key, doc_id))
        else:
            _, gone = heapq.heapreplace(self._heap, (-key, doc_id))
            del self._windows[gone]

    def documents(self) -> list[tuple[str, list[Ids]]]:
        return [(doc_id, self._windows[doc_id]) for _, doc_id in sorted(self._heap, reverse=True)]


def _text_of(ids: Ids) -> str:
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=16).hexdigest()


def _read(inputs: Sequence[str], options: ReadOptions, limit: int | None) -> Iterator[Document | BadRow]:
    if len(inputs) == 1 and (Path(inputs[0]) / "windows").is_dir():
        inputs = [str(Path(inputs[0]) / "windows")]
        options = ReadOptions(id_key="doc_id", group_by="group")
    left = limit
    for source in find_sources(inputs):
        for row in read_documents(source, options):
            if left is not None and isinstance(row, Document):
                if left == 0:
                    return
                left -= 1
            yield row


def _windows_of(row: Document, tokenizer: WindowTokenizer, length: int, count: int, seed: int) -> list[Ids]:
    """Up to `count` windows of a document that do not overlap, their places uniform."""
    if row.input_ids is not None:
        first, last = _special(row.input_ids, tokenizer)
        prefix, ids, suffix = np.split(row.input_ids, [first, len(row.input_ids) - last])
    else:
        prefix, ids, suffix = tokenizer.prefix, tokenizer.encode([row.text or ""])[0].ids, tokenizer.suffix
    room = length - len(prefix) - len(suffix)
    count = min(count, len(ids) // room)
    if count == 0:
        return []
    chance = Random(f"{seed} {row.doc_id}")
    free = len(ids) - count * room
    starts = [gap + i * room for i, gap in enumerate(sorted(chance.randrange(free + 1) for _ in range(count)))]
    return [np.concatenate([prefix, ids[start : start + room], suffix]) for start in starts]


def _special(ids: Ids, tokenizer: WindowTokenizer | None) -> tuple[int, int]:
    """How many special tokens stand before and after the text of a window."""
    if tokenizer is None:
        return 0, 0
    p, s = len(tokenizer.prefix), len(tokenizer.suffix)
    return (
        p if np.array_equal(ids[:p], tokenizer.prefix) else 0,
        s if np.array_equal(ids[len(ids) - s :], tokenizer.suffix) else 0,
    )


def build_controls(
    samples: Sequence[Sample],
    *,
    kinds: Sequence[str] = (*PAIRED, "degenerate"),
    segment: int = 512,
    seed: int = 0,
    tokenizer: WindowTokenizer | None = None,
    per_kind: int = 8,
) -> list[Sample]:
    """Make the controls of coherent windows.

    Every paired kind gives one control for each coherent window, every degenerate kind `per_kind` in all.

    Args:
        samples: of `draw_coherent`, all of one length; those that are not coherent are left aside.
        kinds: of `KINDS`, or "degenerate" for all of `DEGENERATE`.
        segment: tokens of a segment.
        seed: of everything random.
        tokenizer: the one that made the windows: its special tokens stay at the ends of every control. Without it,
            windows are taken to have none, and only paired kinds and "degenerate/shuffled-tokens" can be made.
        per_kind: windows of each degenerate kind.

    Returns:
        The controls, ordered by kind. Where a group has fewer documents in a fold than a window has segments, a
        document comes back in a mixed window, but not before the others had their turn.

    Raises:
        UsageError: no such kind; a window shorter than two segments; a group with fewer than two documents in a fold,
            or with one that has more than half of its windows there.
    """
    coherent = [sample for sample in samples if sample.kind == "coherent"]
    wanted = [name for kind in kinds for name in (DEGENERATE if kind == "degenerate" else (kind,))]
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise UsageError(f"There is no control '{unknown[0]}'. Choose of: {', '.join(PAIRED)}, degenerate.")
    if len({len(sample.input_ids) for sample in coherent}) != 1:
        raise UsageError("Controls are made of coherent windows of one length.")
    length = len(coherent[0].input_ids)
    if not 0 < 2 * segment <= length:
        raise UsageError(f"--segment {segment} does not fit twice into a window of {length} tokens.")
    controls: list[Sample] = []
    for kind in dict.fromkeys(wanted):
        chance = Random(f"{seed} {kind}")
        if kind in _MAKERS:
            for family in _families(coherent, chance):
                controls += _paired(kind, family, segment, tokenizer, chance)
        elif kind == SHUFFLED_TOKENS:
            controls += _shuffled_tokens(coherent, tokenizer, per_kind, chance)
        else:
            controls += _generated(kind, coherent, tokenizer, per_kind, chance)
    return controls


def _families(coherent: Sequence[Sample], chance: Random) -> Iterator[list[Sample]]:
    """The windows that may be mixed: of one group and fold, documents in random order, each one's windows together."""
    families: dict[tuple[str, int], dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in coherent:
        families[sample.group, sample.fold][sample.doc_id].append(sample)
    for (group, fold), documents in sorted(families.items()):
        if len(documents) < 2:
            raise UsageError(
                f"Group '{group}' has one document in fold {fold}, and controls mix at least two. "
                "Draw more documents (--per-group), use fewer folds, or leave the group out."
            )
        if 2 * max(map(len, documents.values())) > sum(map(len, documents.values())):
            raise UsageError(
                f"One document has more than half of the windows of group '{group}' in fold {fold}, so they cannot be "
                "mixed with those of others. Take fewer of each document (--per-document)."
            )
        names = sorted(documents)
        chance.shuffle(names)
        yield [sample for name in names for sample in documents[name]]


def _paired(
    kind: str, family: list[Sample], segment: int, tokenizer: WindowTokenizer | None, chance: Random
) -> Iterator[Sample]:
    ends = [_special(sample.input_ids, tokenizer) for sample in family]
    bodies = [s.input_ids[p : len(s.input_ids) - e] for s, (p, e) in zip(family, ends, strict=True)]
    if len({len(body) for body in bodies}) != 1:
        raise UsageError("Controls are made of windows that all begin and end with the same special tokens.")
    most = max(Counter(sample.doc_id for sample in family).values())
    for first, body in _MAKERS[kind](bodies, most, segment, chance):
        ids = family[first].input_ids.copy()
        ids[ends[first][0] : len(ids) - ends[first][1]] = body
        yield Sample(kind, family[first].group, family[first].doc_id, family[first].fold, ids)


# Makers of paired controls. `bodies` are windows without special tokens, of which at most `most` neighbours are of one
# document; each control comes with the number of the window that its first tokens are from, and each window is the
# first of one control.


def _mixed(bodies: list[Ids], most: int, segment: int, chance: Random) -> Iterator[tuple[int, Ids]]:
    """Segment p of control i is from window i + shift(p).

    Shifts that differ by `most` or more, around the circle, lead to different documents; all are used before one comes
    back, and none follows itself.
    """
    n, starts = len(bodies), range(0, len(bodies[0]), segment)
    shifts = list(range(most, n - most + 1, most))
    if len(shifts) < 3:  # so few documents that some segments must stay
        shifts.append(0)
    order: list[int] = []
    while len(order) < len(starts):
        again = chance.sample(shifts, len(shifts))
        if order and len(again) > 1 and again[0] == order[-1]:
            again.append(again.pop(0))
        order += again
    for i in range(n):
        sources = [(i + order[p]) % n for p in range(len(starts))]
        yield sources[0], np.concatenate([bodies[j][at : at + segment] for j, at in zip(sources, starts, strict=True)])


def _shuffled(bodies: list[Ids], most: int, segment: int, chance: Random) -> Iterator[tuple[int, Ids]]:
    for i, body in enumerate(bodies):
        pieces = np.split(body, range(segment, len(body), segment))
        order = list(range(len(pieces)))
        while any(place == piece for place, piece in enumerate(order)):  # about e tries
            chance.shuffle(order)
        yield i, np.concatenate([pieces[piece] for piece in order])


def _far_half(bodies: list[Ids], most: int, segment: int, chance: Random) -> Iterator[tuple[int, Ids]]:
    n, half = len(bodies), len(bodies[0]) // 2
    shift = chance.randrange(most, n - most + 1)
    for i, body in enumerate(bodies):
        j = (i + shift) % n
        yield j, np.concatenate([bodies[j][:half], body[half:]])


def _pieces(bodies: list[Ids], most: int, segment: int, chance: Random) -> Iterator[tuple[int, Ids]]:
    for i, body in enumerate(bodies):
        pieces: list[Ids] = []
        j, missing = i, len(body)
        while missing:
            size = min(missing, chance.randrange(min(_SHORTEST_PIECE, segment), segment + 1))
            at = chance.randrange(len(body) - size + 1)
            pieces.append(bodies[j][at : at + size])
            missing -= size
            j = (j + chance.randrange(most, len(bodies) - most + 1)) % len(bodies)
        yield i, np.concatenate(pieces)


_MAKERS: dict[str, Callable[[list[Ids], int, int, Random], Iterator[tuple[int, Ids]]]] = {
    "mixed": _mixed,
    "shuffled": _shuffled,
    "far-half": _far_half,
    "pieces": _pieces,
}


def _shuffled_tokens(
    coherent: Sequence[Sample], tokenizer: WindowTokenizer | None, count: int, chance: Random
) -> Iterator[Sample]:
    for sample in chance.sample(sorted(coherent, key=lambda sample: sample.key), min(count, len(coherent))):
        first, last = _special(sample.input_ids, tokenizer)
        ids = sample.input_ids.copy()
        body = ids[first : len(ids) - last].tolist()
        chance.shuffle(body)
        ids[first : len(ids) - last] = body
        yield Sample(SHUFFLED_TOKENS, "", sample.doc_id, sample.fold, ids)


def _generated(
    kind: str, coherent: Sequence[Sample], tokenizer: WindowTokenizer | None, count: int, chance: Random
) -> Iterator[Sample]:
    if tokenizer is None:
        raise UsageError(f"The control '{kind}' is text: give the tokenizer that the windows were cut with.")
    generate = degenerate.KINDS[kind.removeprefix("degenerate/")]
    folds = 1 + max(sample.fold for sample in coherent)
    length = len(coherent[0].input_ids)
    room = length - len(tokenizer.prefix) - len(tokenizer.suffix)
    for i in range(count):
        document, size = chance.getrandbits(64), 4 * room
        ids = tokenizer.encode([generate(Random(document), size)])[0].ids
        while len(ids) < room:
            size *= 2
            if size > _MOST_CHARACTERS * 2 * room:
                raise UsageError(f"The tokenizer makes fewer than {room} tokens of {size // 2} characters of '{kind}'.")
            ids = tokenizer.encode([generate(Random(document), size)])[0].ids
        ids = np.concatenate([tokenizer.prefix, ids[:room], tokenizer.suffix])
        yield Sample(kind, "", f"{kind}/{i}", i % folds, ids)
