"""Documents become packed windows on disk: tokenised once in bounded memory, then read through a memory map.

A document is cut into pieces of at most a window, each with the special tokens that the model expects around any
input; the pieces are packed into windows by best fit (Ding et al. 2024, arXiv 2404.10830), so that none is cut again
and little room is left over.
"""

from __future__ import annotations

import json
import time
from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longsift.documents import BadRow, Document, ReadOptions, read_documents
from longsift.errors import InputError, ModelError, TooManyBadRows, UsageError
from longsift.progress import Progress
from longsift.shards import RunFolder, write_json
from longsift.sources import Source
from longsift.tables import publish
from longsift.windows import WindowTokenizer

Ints = npt.NDArray[np.int64]
_BATCH_CHARS = 4 << 20  # tokenised in one call, on all cores
_SHORTEST = 2  # tokens of a piece: one to predict from and one to predict
IGNORED = -100  # the label of a token that no loss is taken of, as in transformers


@dataclass(frozen=True, slots=True)
class Cutting:
    """How documents become pieces.

    Attributes:
        tokenizer: gives the ids of a text, and the special tokens around each piece.
        end: id that stands at the end of every document of text; None for none.
        vocab_size: ids must be below this.
        window: tokens of the longest piece, special tokens included.
    """

    tokenizer: WindowTokenizer
    end: int | None
    vocab_size: int
    window: int

    @property
    def room(self) -> int:
        """Tokens of text in a piece."""
        room = self.window - len(self.tokenizer.prefix) - len(self.tokenizer.suffix)
        if room < _SHORTEST:
            raise UsageError(f"a window of {self.window} tokens has no room for text: give a larger --window")
        return room

    def pieces(self, documents: Sequence[Document]) -> Iterator[tuple[Document, list[npt.NDArray[np.int32]]]]:
        """Give each document with its pieces, in order; a remainder of one token is dropped.

        Raises:
            ModelError: an id that the model does not have.
        """
        texts = [document for document in documents if document.input_ids is None]
        encoded = iter(self.tokenizer.encode([document.text or "" for document in texts]))
        for document in documents:
            if document.input_ids is not None:
                ids, room, around = document.input_ids, self.window, (ids_of(), ids_of())
            else:
                ids = np.concatenate([next(encoded).ids, ids_of(*(() if self.end is None else (self.end,)))])
                room, around = self.room, (self.tokenizer.prefix, self.tokenizer.suffix)
            if (largest := int(ids.max())) >= self.vocab_size:
                raise ModelError(
                    f"{document.file}, row {document.row} has the token {largest}, and the model's vocabulary is "
                    f"{self.vocab_size:,}. Use the model's tokenizer, or a configuration with a larger vocab_size."
                )
            cuts = [ids[start : start + room] for start in range(0, len(ids), room)]
            yield (
                document,
                [np.concatenate([around[0], cut, around[1]]) for cut in cuts if len(cut) >= _SHORTEST],
            )


def ids_of(*ids: int) -> npt.NDArray[np.int32]:
    """Token ids as an array."""
    return np.array(ids, dtype=np.int32)


def read_batches(
    sources: Iterable[Source], options: ReadOptions, limit: int | None, progress: Progress, bad: Counter[str]
) -> Iterator[list[Document]]:
    """Give documents in lists of some megabytes of text, counting rows that are none by their reason."""
    batch: list[Document] = []
    size = count = 0
    for source in sources:
        for row in read_documents(source, options, progress.advance):
            if isinstance(row, BadRow):
                bad[row.reason] += 1
                continue
            batch.append(row)
            size += len(row.text or "") + (0 if row.input_ids is None else len(row.input_ids))
            count += 1
            if size >= _BATCH_CHARS or count == limit:
                yield batch
                batch, size = [], 0
            if count == limit:
                return
    if batch:
        yield batch


def best_fit(lengths: Ints, window: int) -> tuple[Ints, Ints]:
    """Pack pieces into windows, the longest first, each where it leaves the least room.

    Args:
        lengths: tokens of every piece, (pieces,), each at most `window`.

    Returns:
        order: the pieces, window after window, (pieces,).
        offsets: where each window's pieces begin in `order`, and its end, (windows + 1,).

    >>> best_fit(np.array([3, 8, 5, 2]), 8)
    (array([1, 2, 0, 3]), array([0, 1, 3, 4]))
    """
    window_of = np.empty(len(lengths), dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # windows by their room
    rooms: list[int] = []  # the keys, sorted
    windows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            chosen, left = windows, window - length
            windows += 1
        else:
            chosen, left = with_room[rooms[at]].pop(), rooms[at] - length
            if not with_room[rooms[at]]:
                del with_room[rooms.pop(at)]
        window_of[piece] = chosen
        if left >= _SHORTEST:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    order = np.argsort(window_of, kind="stable")
    return order, np.searchsorted(window_of[order], np.arange(windows + 1))


def pack(
    sources: Sequence[Source],
    folder: Path,
    cutting: Cutting,
    options: ReadOptions,
    *,
    limit: int | None = None,
    max_bad: float = 0.0,
    identity: dict[str, Any],
    quiet: bool = False,
) -> PackedWindows:
    """Tokenise documents and pack them into windows, or read what an earlier run made of the same.

    Args:
        folder: of the cache; what it holds of other documents is replaced.
        identity: everything that the windows depend on, as JSON values.
        max_bad: share of bad rows above which nothing is packed.

    Raises:
        InputError: no document, or a source that cannot be opened.
        TooManyBadRows: too many rows are no documents.
        OutputError: another process is writing the same cache.
    """
    with RunFolder(folder).lock():
        if (packed := find_packed(folder, identity)) is not None:
            return packed
        (folder / "packed.json").unlink(missing_ok=True)
        bad: Counter[str] = Counter()
        groups: Counter[str] = Counter()
        lengths = array("q")  # 8 bytes a piece, which is all that is held of the documents
        documents = 0
        dtype = np.dtype(np.uint16 if cutting.vocab_size <= 1 << 16 else np.uint32)
        total = sum(source.size for source in sources)
        started = time.perf_counter()
        with (
            Progress("tokenising", total, "bytes", quiet=quiet) as progress,
            publish(folder / "tokens.bin") as path,
            path.open("wb") as file,
        ):
            for batch in read_batches(sources, options, limit, progress, bad):
                for document, pieces in cutting.pieces(batch):
                    documents += 1
                    for piece in pieces:
                        file.write(piece.astype(dtype).tobytes())
                        lengths.append(len(piece))
                        groups[document.group] += len(piece)
                progress.count(documents=len(batch))
        rows = documents + bad.total()
        if bad.total() > max_bad * rows:
            raise TooManyBadRows(
                f"{bad.total():,} of {rows:,} rows are bad, more than --max-bad {max_bad:g}. "
                f"Most often: {bad.most_common(1)[0][0]}."
            )
        sizes = np.array(lengths, dtype=np.int64)
        if not len(sizes):
            raise InputError(f"There is nothing to train on: of {rows:,} rows none has two tokens.")
        order, offsets = best_fit(sizes, cutting.window)
        starts = np.cumsum(sizes) - sizes
        for name, values in (("starts", starts[order]), ("lengths", sizes[order]), ("offsets", offsets)):
            with publish(folder / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, values)
        counts = {
            "documents": documents,
            "bad_rows": bad.total(),
            "tokens": int(sizes.sum()),
            "pieces": len(sizes),
            "windows": len(offsets) - 1,
            "groups": dict(groups.most_common()),
            "seconds": round(time.perf_counter() - started, 1),
        }
        facts = {"window": cutting.window, "dtype": dtype.name, "pad": cutting.end or 0}
        write_json(folder / "packed.json", {"identity": identity, "counts": counts, **facts})
    packed = find_packed(folder, identity)
    assert packed is not None
    return packed


def find_packed(folder: Path, identity: dict[str, Any]) -> PackedWindows | None:
    """The windows in `folder`, when they are finished and of that identity."""
    try:
        facts = json.loads((folder / "packed.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if facts["identity"] != json.loads(json.dumps(identity)):
        return None
    return PackedWindows(folder, facts)


class PackedWindows:
    """Windows of packed documents, read through a memory map.

    Attributes:
        window: tokens of every window.
        counts: documents, bad_rows, tokens (special ones included), pieces, windows, and tokens by group.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.window = int(facts["window"])
        self.counts: dict[str, Any] = facts["counts"]
        self._pad = int(facts["pad"])
        self._starts, self._lengths, self._offsets = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("starts", "lengths", "offsets")
        )
        self._tokens = np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Ints]:
        """One window.

        Returns:
            input_ids, position_ids and labels, each (window,). Positions begin anew with every piece. The first token
            of a piece has no label, nor has the padding, which is a piece of its own at the end.
        """
        ids = np.full(self.window, self._pad, dtype=np.int64)
        positions = np.empty(self.window, dtype=np.int64)
        labels = np.full(self.window, IGNORED, dtype=np.int64)
        at = 0
        for piece in range(self._offsets[index], self._offsets[index + 1]):
            start, length = int(self._starts[piece]), int(self._lengths[piece])
            ids[at : at + length] = self._tokens[start : start + length]
            positions[at : at + length] = np.arange(length)
            labels[at + 1 : at + length] = ids[at + 1 : at + length]
            at += length
        positions[at:] = np.arange(self.window - at)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


class WindowOrder:
    """Which window comes when: all in a random order, then all in another, as long as the training goes on.

    It depends on the seed alone, so that neither a restart nor the number of devices changes what a step sees.
    A data set for PyTorch's loaders.

    Args:
        windows: to draw from.
        count: windows in all.
    """

    def __init__(self, windows: PackedWindows, count: int, seed: int) -> None:
        self._windows, self._count, self._seed = windows, count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    def index(self, position: int) -> int:
        """The window at a position of the training."""
        epoch, at = divmod(position, len(self._windows))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._windows))
            self._epoch = epoch
        return int(self._order[at])

    def __getitem__(self, position: int) -> dict[str, Ints]:
        if not 0 <= position < self._count:  # what ends an iteration
            raise IndexError(position)
        return self._windows[self.index(position)]
