"""Documents become windows: tokenised, then cut by LongAttn's rule, in the order in which they came.

Texts go through the fast backend of a transformers tokenizer. The ids of a window are those of its whole
document's tokenisation, and its text is an exact slice of the document: nothing is tokenised a second time.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import Metaspace

from longsift.documents import BadRow, Document, excerpt
from longsift.errors import ModelError, UsageError
from longsift.tables import WINDOWS

# ASCII characters tokenised in one call: enough for every core; their encodings take some hundred MB.
_BATCH_CHARS = 2 << 20
# Longer texts are tokenised in parts, so that one book uses every core and bounded memory.
# Short ones stay in a core's cache: parts of 2¹⁸ characters take nearly twice the time of parts of 2¹⁴ or 2¹⁵.
_PART_CHARS = 1 << 15
# Text on either side of a place, with which it is checked that the place parts tokens cleanly.
_CONTEXT_CHARS = 512
# Longer stretches are not tokenised in search of a place: there would be one before.
_LONGEST_TRIED = 4 * _PART_CHARS
# Places checked in one stretch before it is left whole.
_TRIES = 4
# Where pre-tokenizers begin anew: after a line break with ink on both sides, before a space between words.
_PLACE = re.compile(r"\S\r?\n(?=\S)|\w(?= \w)")
# What a tokenizer marks every start with goes before this character, of which the tokens are then dropped. It is for
# private use: vocabularies do not know it, so that no merge joins it with what comes after.
_STRANGER = "\ue000"

_T = TypeVar("_T")


def window_starts(n: int, length: int) -> list[int]:
    """Where the windows of a document of `n` tokens start (LongAttn, arXiv 2502.16860).

    While more than three lengths remain, a window is taken from the front and one from the back. The rest
    gives its front and its back, and its middle where it is longer than two lengths; only these can overlap.

    Args:
        n: tokens of the document.
        length: tokens of a window, at least 1.

    Returns:
        Offsets in tokens, ascending: [] for a document shorter than a window, [0] for one just as long.

    >>> window_starts(90, 20)  # 0 and 70 first; then front, middle and back of the 50 tokens between
    [0, 20, 35, 50, 70]
    """
    if n <= length:
        return [0] if n == length else []
    starts = []
    front, back = 0, n
    while back - front > 3 * length:
        starts += [front, back - length]
        front, back = front + length, back - length
    starts += [front, back - length]
    if back - front > 2 * length:
        starts.append(front + (back - front - length) // 2)
    return sorted(starts)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one text, without special tokens.

    Attributes:
        ids: (n,) int32.
        offsets: (n, 2) int32, first character and end of each token; two tokens may share a character.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]

    def __getitem__(self, tokens: slice) -> Encoded:
        return Encoded(self.ids[tokens], self.offsets[tokens])

    def firsts(self) -> npt.NDArray[np.int64]:
        """Indices of the tokens that begin where the one before ends: others share a character with it."""
        return np.flatnonzero(self.offsets[1:, 0] == self.offsets[:-1, 1]) + 1


class WindowTokenizer:
    """A fast tokenizer that gives ids and character offsets, using every core.

    Attributes:
        prefix, suffix: (p,) and (s,) int32, special tokens that the model puts around every input.
    """

    def __init__(self, backend: Tokenizer) -> None:
        """Take over a `tokenizers.Tokenizer`: its truncation, padding and post-processor are removed.

        Raises:
            ModelError: the special tokens that it adds are not a prefix and a suffix.
        """
        backend.no_truncation()
        backend.no_padding()
        self.prefix, self.suffix = _special_tokens(backend)
        # It would add the special tokens to each part of a text, and trim white space off the offsets.
        backend.post_processor = None
        self._backend = backend
        model, splitter, normalizer = backend.model, backend.pre_tokenizer, backend.normalizer
        self._merges = isinstance(model, BPE) and not (
            model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix
        )
        # As of sentencepiece: each character is rewritten for itself, then only the merging of pairs makes tokens.
        # Without a token for unknown characters the library drops these, and the offsets after them are wrong.
        self._only_merges = (
            self._merges
            and not model.ignore_merges
            and model.unk_token is not None
            and (splitter is None or isinstance(splitter, Metaspace))
            and (normalizer is None or _rewrites_characters(json.loads(normalizer.__getstate__())))
        )
        # A sum over the whole text: its rounding tells which of two equal orders of tokens wins, as in a run of spaces.
        unsplit = splitter is None or (isinstance(splitter, Metaspace) and not splitter.split)
        self._whole = unsplit and isinstance(model, Unigram)
        added = backend.get_added_tokens_decoder()
        self._added = np.array([*added], dtype=np.int32)
        self._reach = 2 + max((len(token.content) for token in added.values()), default=0)

    @classmethod
    def load(cls, model: str, revision: str | None = None, trust_remote_code: bool = False) -> WindowTokenizer:
        """Load the tokenizer of a model.

        Args:
            model: a local folder, a `.safetensors` file in one, or an id on the Hub, `org/name` or
                `org/name@revision`.
            revision: branch, tag or commit on the Hub; wins over one in `model`.
            trust_remote_code: run Python that comes with the model.

        Raises:
            ModelError: there is no tokenizer, or none with a fast backend.
        """
        from transformers import AutoTokenizer

        name = model
        if model.endswith(".safetensors") and Path(model).is_file():
            name = str(Path(model).parent)
        elif not Path(model).exists():
            name, _, given = model.partition("@")
            revision = revision or given or None
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code, use_fast=True
            )
        except Exception as error:  # transformers and the Hub have many; all mean the same here
            raise ModelError(
                f"no tokenizer for {model!r}: {error}\n"
                "Give a folder that holds tokenizer.json, or a model id on the Hugging Face Hub"
            ) from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"the tokenizer of {model!r} ({type(tokenizer).__name__}) has no fast backend, which "
                "longsift needs: add a tokenizer.json to the model"
            )
        return cls(backend)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary, the rules and the special tokens: equal means that ids mean the same."""
        parts = (self._backend.to_str(), self.prefix.tolist(), self.suffix.tolist())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenise texts, each as if alone and in one piece.

        Long texts are tokenised in parts, on all cores (`TOKENIZERS_PARALLELISM`); where no cut holds, the text stays
        whole. Where the merging of pairs alone makes tokens, as with Llama 2 (no pre-tokenizer, or Metaspace), the cuts
        are proved, see `_meet`; the mark that such a tokenizer puts before every text does not reach the parts.
        Otherwise each cut is checked: the tokens of the text around it must be those of its two sides. Where neither
        lines nor words begin, the cut is between two tokens of byte-pair encoding.
        """
        collected: list[list[Encoded]] = [[] for _ in texts]
        parts = ((index, *span) for index, text in enumerate(texts) for span in self._spans(text))
        for batch in _batches(parts, lambda part: _cost(texts[part[0]], part[2] - part[1]), _BATCH_CHARS):
            encodings = self._encode_parts([(texts[index], start, end) for index, start, end in batch])
            for (index, _, _), part in zip(batch, encodings, strict=True):
                collected[index].append(part)
        return [self._joined(text, parts) for text, parts in zip(texts, collected, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included; characters that are cut at an end are replaced by U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        return [
            Encoded(
                np.array(encoding.ids, dtype=np.int32),
                # Faster than np.array on a list of pairs.
                np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int32).reshape(-1, 2),
            )
            for encoding in self._backend.encode_batch(texts, add_special_tokens=False)
        ]

    def _encode_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[Encoded]:
        """The tokens of texts from `start` to `end`, with offsets in the text, as if more came before."""
        heads = [_STRANGER if start and self._only_merges else "" for _, start, _ in parts]
        texts = [head + text[start:end] for head, (text, start, end) in zip(heads, parts, strict=True)]
        kept = []
        for head, (_, start, _), encoded in zip(heads, parts, self._encode(texts), strict=True):
            first = int(np.searchsorted(encoded.offsets[:, 0], len(head)))
            kept.append(Encoded(encoded.ids[first:], encoded.offsets[first:] + (start - len(head))))
        return kept

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Consecutive (start, end) of the parts of a text that can be tokenised alone."""
        start, end = 0, -1
        while end < len(text):
            end = self._next_cut(text, start)
            yield start, end
            start = end

    def _next_cut(self, text: str, start: int) -> int:
        find = self._seam_near if self._only_merges else self._checked_cut
        length = len(text) if self._whole else _PART_CHARS
        while start + length < len(text):
            if (place := find(text, start, length)) is not None:
                return place
            length *= 2  # where no place holds, ever fewer are tried
        return len(text)

    def _seam_near(self, text: str, start: int, length: int) -> int | None:
        """A place about `length` after `start` where a token begins in the text around it, for `_meet` to prove."""
        middle, wide = start + length, _CONTEXT_CHARS + self._reach
        [near] = self._encode_parts([(text, max(0, middle - wide), middle + wide)])
        places = near.offsets[self._seams(near), 0]
        places = places[np.abs(places - middle) < _CONTEXT_CHARS // 2]
        likely = {match.end() for match in _PLACE.finditer(text, middle - _CONTEXT_CHARS, middle + _CONTEXT_CHARS)}
        return min(places.tolist(), key=lambda place: (place not in likely, abs(place - middle)), default=None)

    def _seams(self, encoded: Encoded) -> npt.NDArray[np.int64]:
        """Indices of `firsts` with no added token on either side, which may look at what is beside it."""
        firsts, added = encoded.firsts(), np.isin(encoded.ids, self._added)
        return firsts[~(added[firsts] | added[firsts - 1])]

    def _joined(self, text: str, parts: list[Encoded]) -> Encoded:
        joined = parts[:1]
        for part in parts[1:]:
            for _ in range(_TRIES):
                if not self._only_merges or self._meet(text, joined[-1], part):
                    break
                joined[-1], part = self._moved_back(text, joined[-1], part)
            else:
                return self._encode([text])[0]
            joined.append(part)
        return _concatenated(joined)

    def _meet(self, text: str, left: Encoded, right: Encoded) -> bool:
        """Whether the tokens of two neighbouring parts are, together, those of both in one piece.

        It is enough that the last token of `left` and the first of `right` are the tokens of their own text. Suppose
        that in the whole a merge crosses the cut, and take the first that does. Until then each side is merged as if
        alone, and what this one joins lies within those two tokens, to which no merge joins what is beyond them. The
        order of merges is by rank, then from the left: within the two tokens it is the same where they are the whole
        text. So there, too, this merge comes next, and the tokens are not these two.
        """
        if not len(right.ids):
            return False  # the character before it took part in its only token
        last, after = max([0, *left.firsts()[-1:]]), min([len(right.ids), *right.firsts()[:1]])
        left, right = left[last:], right[:after]
        [alone] = self._encode_parts([(text, int(left.offsets[0, 0]), int(right.offsets[-1, 1]))])
        return _is_both(alone, left, right) and not np.isin(alone.ids, self._added).any()

    def _moved_back(self, text: str, left: Encoded, right: Encoded) -> tuple[Encoded, Encoded]:
        """Cut before an earlier token of `left`, far enough from its end, which is no end in the whole text."""
        seams, cut = self._seams(left), left.offsets[-1, 1]
        places = left.offsets[seams, 0]
        earlier = int(np.searchsorted(places, cut - _CONTEXT_CHARS)) - 1
        if earlier < 0 or not len(right.ids) or cut - places[earlier] > _LONGEST_TRIED:
            return left, right
        [right] = self._encode_parts([(text, int(places[earlier]), int(right.offsets[-1, 1]))])
        return left[: seams[earlier]], right

    def _checked_cut(self, text: str, start: int, length: int) -> int | None:
        places = _PLACE.finditer(text, start + length, start + 2 * length)
        for match in islice(places, _TRIES):
            if self._parts_cleanly(text, match.end()):
                return match.end()
        return self._cut_between_tokens(text, start, length) if self._merges and length <= _LONGEST_TRIED else None

    def _parts_cleanly(self, text: str, place: int) -> bool:
        left, right = text[max(0, place - _CONTEXT_CHARS) : place], text[place : place + _CONTEXT_CHARS]
        both, first, second = self._encode([left + right, left, right])
        return _is_both(both, first, Encoded(second.ids, second.offsets + len(left)))

    def _cut_between_tokens(self, text: str, start: int, length: int) -> int | None:
        """A place where byte-pair encoding parts `text` after `start`, another such place, at most `length` on.

        Where the whole has a boundary within a word, no merge crosses it, and those to either side do not see each
        other: both sides have the tokens of the whole. So it is enough that a pre-tokenizer which begins anew there
        finds the same words: it might count from the start of a run, as of digits.
        """
        near = text[start : start + length]
        normalizer = self._backend.normalizer
        if normalizer is not None and normalizer.normalize_str(near) != near:
            return None
        [known] = self._encode([near])
        words = self._words(near)
        firsts = known.firsts()
        places = known.offsets[firsts, 0]
        compared = _CONTEXT_CHARS // 2  # the rest may be other words and tokens for being cut off
        for i in range(int(np.searchsorted(places, length - _CONTEXT_CHARS)) - 1, -1, -1)[:_TRIES]:
            place, token = int(places[i]), int(firsts[i])
            after = near[place : place + _CONTEXT_CHARS]
            [right] = self._encode([after])
            ids = right.ids[: np.searchsorted(right.offsets[:, 0], compared)]
            if (
                np.array_equal(ids, known.ids[token : token + len(ids)])
                and np.array_equal(_between(self._words(after), 0, compared), _between(words - place, 0, compared))
                and np.array_equal(self._encode([near[:place]])[0].ids, known.ids[:token])
            ):
                return start + place
        return None

    def _words(self, text: str) -> npt.NDArray[np.int64]:
        """Where the pre-tokenizer's words begin."""
        splitter = self._backend.pre_tokenizer
        words = [("", (0, 0))] if splitter is None else splitter.pre_tokenize_str(text)
        return np.array([begin for _, (begin, _) in words], dtype=np.int64)


def _rewrites_characters(rule: dict[str, Any]) -> bool:
    """Whether a normalizer, given as its JSON, rewrites each character for itself, but for what it puts before all."""
    if rule["type"] == "Sequence":
        return all(map(_rewrites_characters, rule["normalizers"]))
    replaced = len(rule.get("pattern", {}).get("String", ""))
    return rule["type"] == "Prepend" or (rule["type"] == "Replace" and replaced == 1 and rule["content"] != "")


def _concatenated(parts: Sequence[Encoded]) -> Encoded:
    return Encoded(np.concatenate([part.ids for part in parts]), np.concatenate([part.offsets for part in parts]))


def _is_both(encoded: Encoded, left: Encoded, right: Encoded) -> bool:
    both = _concatenated([left, right])
    return np.array_equal(encoded.ids, both.ids) and np.array_equal(encoded.offsets, both.offsets)


def _between(places: npt.NDArray[np.int64], low: int, high: int) -> npt.NDArray[np.int64]:
    return places[(places > low) & (places < high)]


def _cost(text: str, length: int) -> int:
    """What tokenising a part of a text takes, in ASCII characters: others may become a token a byte."""
    return length if text.isascii() else 2 * length


def _special_tokens(backend: Tokenizer) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            prefix, suffix = full[:start], full[start + len(plain) :]
            return np.array(prefix, dtype=np.int32), np.array(suffix, dtype=np.int32)
    raise ModelError(
        f"the tokenizer turns 'a' into {full} with special tokens and into {plain} without: "
        "longsift can only use special tokens that stand before or after the text"
    )


@dataclass(slots=True)
class Window:
    """One row of the windows table; see `longsift.tables.WINDOWS`.

    Attributes:
        window_id: `<doc_id>:<index>`.
        doc_id, group: as in the document.
        index: 0-based, in the order of `start`.
        start: offset in the document's own tokens.
        input_ids: (n_tokens,) int32, special tokens included.
        text: the characters that the window covers; None for rows of ids without text.
        metadata: the document's other columns, a JSON object.
    """

    window_id: str
    doc_id: str
    group: str
    index: int
    start: int
    input_ids: npt.NDArray[np.int32]
    text: str | None
    metadata: str


@dataclass(slots=True)
class TooShort:
    """A document with fewer tokens than a window has room for."""

    doc_id: str
    group: str
    n_tokens: int


@dataclass(slots=True)
class Tally:
    """What became of the rows of one source: `add` what `cut_windows` yields."""

    documents: int = 0  # too short ones included, bad rows not
    too_short: int = 0
    too_short_tokens: int = 0
    windows: int = 0
    tokens: int = 0  # in windows, special and overlapping ones included
    bad_rows: Counter[str] = field(default_factory=Counter)  # by reason

    def add(self, row: Window | TooShort | BadRow) -> None:
        match row:
            case Window():
                self.documents += row.index == 0
                self.windows += 1
                self.tokens += len(row.input_ids)
            case TooShort():
                self.documents += 1
                self.too_short += 1
                self.too_short_tokens += row.n_tokens
            case BadRow():
                self.bad_rows[row.reason] += 1


def cut_windows(
    rows: Iterable[Document | BadRow], tokenizer: WindowTokenizer | None = None, length: int | None = None
) -> Iterator[Window | TooShort | BadRow]:
    """Cut documents into windows, keeping their order; bad rows pass through.

    Args:
        rows: what `read_documents` yields. A document of ids becomes one window as it is, of any length.
        tokenizer: of the model that will score; not needed where all documents are ids.
        length: tokens of a window, special tokens included; not needed where all documents are ids.

    Yields:
        For each document its `Window`s, or `TooShort`; a `BadRow` where the tokenizer fails on it.

    Raises:
        UsageError: a text comes without a tokenizer or length, or the length leaves no room for text.
    """
    if tokenizer and length is not None and length <= len(tokenizer.prefix) + len(tokenizer.suffix):
        raise UsageError(f"a window of {length} tokens has no room for text: give a larger --window")
    for batch in row_batches(rows, _BATCH_CHARS):
        texts = [row for row in batch if isinstance(row, Document) and is_text(row)]
        cuts = _cut_texts(texts, tokenizer, length)
        for row in batch:
            if isinstance(row, BadRow):
                yield row
            elif row.input_ids is not None:
                yield _window(row, 0, 0, row.input_ids, row.text)
            else:
                yield from next(cuts)


def is_text(row: Document | BadRow) -> bool:
    """Whether a row needs a tokenizer."""
    return isinstance(row, Document) and row.input_ids is None


def weight(row: Document | BadRow) -> int:
    """How much work and memory a row takes, in characters and token ids."""
    if isinstance(row, BadRow):
        return len(row.excerpt)
    return len(row.text or ()) + (0 if row.input_ids is None else len(row.input_ids))


def row_batches(rows: Iterable[Document | BadRow], most: int) -> Iterator[list[Document | BadRow]]:
    """Consecutive rows, each list closed by the row that makes it weigh `most` or more."""
    return _batches(rows, weight, most)


def _batches(items: Iterable[_T], weight: Callable[[_T], int], most: int) -> Iterator[list[_T]]:
    batch: list[_T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += weight(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _cut_texts(
    documents: Sequence[Document], tokenizer: WindowTokenizer | None, length: int | None
) -> Iterator[list[Window | TooShort | BadRow]]:
    """What becomes of each document of text, in order."""
    if not documents:
        return
    if tokenizer is None or length is None:
        raise UsageError("documents of text need a tokenizer and a window length: give --model and --window")
    room = length - len(tokenizer.prefix) - len(tokenizer.suffix)
    for document, encoded in zip(documents, _encode_each(tokenizer, documents), strict=True):
        if isinstance(encoded, BaseException):
            reason = f"tokenizer failed: {type(encoded).__name__}"
            yield [BadRow(document.file, document.row, reason, excerpt(str(encoded)))]
        elif len(encoded.ids) < room:
            yield [TooShort(document.doc_id, document.group, len(encoded.ids))]
        else:
            windows: list[Window | TooShort | BadRow] = []
            for index, start in enumerate(window_starts(len(encoded.ids), room)):
                end = start + room
                ids = np.concatenate([tokenizer.prefix, encoded.ids[start:end], tokenizer.suffix])
                covered = slice(encoded.offsets[start, 0], encoded.offsets[end - 1, 1])
                windows.append(_window(document, index, start, ids, (document.text or "")[covered]))
            yield windows


def _encode_each(tokenizer: WindowTokenizer, documents: Sequence[Document]) -> list[Encoded | BaseException]:
    """The tokens of each document's text, or the error that the tokenizer raised on it."""
    try:
        return [*tokenizer.encode([document.text or "" for document in documents])]
    except BaseException as error:
        # A panic of the Rust library is no Exception; its type can only be told by name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if len(documents) == 1:
            return [error]
        return [encoded for document in documents for encoded in _encode_each(tokenizer, [document])]


def _window(document: Document, index: int, start: int, input_ids: npt.NDArray[np.int32], text: str | None) -> Window:
    return Window(
        window_id=f"{document.doc_id}:{index}",
        doc_id=document.doc_id,
        group=document.group,
        index=index,
        start=start,
        input_ids=input_ids,
        text=text,
        metadata=json.dumps(document.metadata, ensure_ascii=False, allow_nan=False),
    )


def windows_table(windows: Sequence[Window]) -> pa.Table:
    """The windows as a table with the schema `WINDOWS`; fewer than 2³¹ tokens in all."""
    n_tokens = [len(window.input_ids) for window in windows]
    ends = np.cumsum([0, *n_tokens], dtype=np.int32)
    ids = np.concatenate([np.empty(0, dtype=np.int32), *(window.input_ids for window in windows)])
    return pa.table(
        {
            "window_id": [window.window_id for window in windows],
            "doc_id": [window.doc_id for window in windows],
            "group": [window.group for window in windows],
            "index": [window.index for window in windows],
            "start": [window.start for window in windows],
            "n_tokens": n_tokens,
            "input_ids": pa.ListArray.from_arrays(ends, ids),
            "text": [window.text for window in windows],
            "metadata": [window.metadata for window in windows],
        },
        schema=WINDOWS,
    )


def sample_key(window_id: str, seed: int) -> int:
    """A uniform 64-bit key of a window; the windows with the N smallest keys are a random sample of N.

    It depends on the id and the seed only, so the sample is the same however many workers read, in any order.
    """
    key = seed.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(window_id.encode(), digest_size=8, key=key).digest(), "little")


class BottomK:
    """Tells of each key in a stream whether it is among the n smallest so far, holding n keys."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._negated: list[int] = []  # a heap whose first is the largest kept key

    def offer(self, key: int) -> bool:
        """Whether the key is among the n smallest so far; of equal keys the first wins."""
        if len(self._negated) < self._n:
            heapq.heappush(self._negated, -key)
            return True
        if not self._negated or key >= -self._negated[0]:
            return False
        heapq.heapreplace(self._negated, -key)
        return True

    @property
    def threshold(self) -> int | None:
        """The largest kept key: at the end, keys up to it are the n smallest. None while no key is kept."""
        return -self._negated[0] if self._negated else None
