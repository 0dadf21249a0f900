"""Documents in, scores out: what the steps for other people's pipelines have in common.

A document is measured as the command line does it: tokenised once, cut into windows by the same rule, and each window
measured by a `Scorer`, with the same bits whatever was measured beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longsift.documents import BadRow, Document
from longsift.errors import UsageError
from longsift.methods import Method
from longsift.pieces import DEFAULT_WINDOW, load_tokenizer
from longsift.scoring import Scorer
from longsift.tables import SCORE_KEYS
from longsift.windows import TooShort, Window, WindowTokenizer, cut_windows

Status: TypeAlias = Literal["ok", "failed", "too short"]
Per: TypeAlias = Literal["document", "window"]

_PLACE = ("index", "start", "n_tokens")
_STATE = ("status", "reason")


@dataclass(slots=True)
class Scored:
    """What became of one document.

    Attributes:
        status: "ok" where a window at least was measured.
        reason: why none was; None where one was.
        windows: one row a window, in order: index, start, n_tokens, status, reason and the method's columns.
        texts: the characters that each window covers; None for windows given as ids.
        best: the row of the measured window whose first column of the method is the largest, or, where none was
            measured, a row of None with the document's status and reason.
    """

    status: Status
    reason: str | None
    windows: list[dict[str, Any]]
    texts: list[str | None]
    best: dict[str, Any]


@dataclass(slots=True)
class _Cut:
    windows: list[Window] = field(default_factory=list)
    status: Status = "failed"
    reason: str | None = None


class DocumentScorer:
    """A `Scorer` for whole documents.

    Args:
        method, model: as of `Scorer`.
        window: tokens of a window that texts are cut into; default 32,768, or what the calculator supports.
        options: further arguments of `Scorer`.

    Attributes:
        scorer: measures the windows.
        window: tokens of a window.

    Raises:
        UsageError: a parameter that the method does not have; a window too short for it.
        ModelError: a calculator that cannot be loaded.
    """

    def __init__(
        self, method: str = "calibrated", *, model: str = "embedded", window: int | None = None, **options: Any
    ) -> None:
        self.scorer = Scorer(method, model=model, **options)
        supported = self.scorer.calculator.max_length or DEFAULT_WINDOW
        self.window = min(DEFAULT_WINDOW, supported) if window is None else window
        shortest = self.scorer.method.shortest()
        if self.window < shortest:
            raise UsageError(f"A window of {self.window} tokens is shorter than the {shortest:,} that {method} needs.")

    @cached_property
    def tokenizer(self) -> WindowTokenizer:
        """The calculator's tokenizer, loaded when the first text comes.

        Raises:
            ModelError: there is none.
        """
        return load_tokenizer(self.scorer.model, self.scorer.revision, self.scorer.trust_remote_code)

    @cached_property
    def columns(self) -> pa.Schema:
        """The columns of a window's row, in order; see `row_columns`."""
        return row_columns(self.scorer.method)

    def score(self, documents: Sequence[str | Sequence[int] | npt.NDArray[np.integer[Any]] | None]) -> list[Scored]:
        """Measure documents, all windows of all of them together.

        Args:
            documents: texts, which are cut into windows, or token ids, each of which is one window as it is. None is a
                document without either, which fails.
        """
        cuts = self._cut(documents)
        rows = self._measure([window for cut in cuts for window in cut.windows])
        return [self._scored(cut, rows) for cut in cuts]

    def _cut(self, documents: Sequence[Any]) -> list[_Cut]:
        cuts = [_Cut() for _ in documents]
        rows: list[Document | BadRow] = []
        for number, document in enumerate(documents):
            fault = _fault(document)
            if fault is not None:
                cuts[number].reason = fault
                continue
            text, ids = (document, None) if isinstance(document, str) else (None, np.asarray(document, dtype=np.int32))
            rows.append(Document(str(number), text, ids, "all", {}, "", number))
        needed = any(isinstance(row, Document) and row.text is not None for row in rows)
        for piece in cut_windows(rows, self.tokenizer if needed else None, self.window if needed else None):
            match piece:
                case Window():
                    cuts[int(piece.doc_id)].windows.append(piece)
                case TooShort():
                    cut = cuts[int(piece.doc_id)]
                    cut.status = "too short"
                    cut.reason = f"{piece.n_tokens:,} tokens, fewer than a window of {self.window:,}"
                case BadRow():
                    assert piece.row is not None
                    cuts[piece.row].reason = f"{piece.reason}: {piece.excerpt}"
        return cuts

    def _measure(self, windows: Iterable[Window]) -> Iterator[dict[str, Any]]:
        windows = list(windows)
        table = self.scorer.score([window.input_ids for window in windows])  # type: ignore[misc]
        measures = table.select([name for name in table.column_names if name not in SCORE_KEYS.names or name in _STATE])
        for window, row in zip(windows, measures.to_pylist(), strict=True):
            yield {"index": window.index, "start": window.start, "n_tokens": len(window.input_ids), **row}

    def _scored(self, cut: _Cut, rows: Iterator[dict[str, Any]]) -> Scored:
        windows = [next(rows) for _ in cut.windows]
        texts = [window.text for window in cut.windows]
        leading = self.columns.names[len(_PLACE) + len(_STATE)]
        measured = [row for row in windows if row["status"] == "ok"]
        if measured:
            return Scored("ok", None, windows, texts, max(measured, key=lambda row: row[leading]))
        reason = windows[0]["reason"] if windows else cut.reason
        nothing = dict.fromkeys(self.columns.names) | {"status": cut.status, "reason": reason}
        return Scored(cut.status, reason, windows, texts, nothing)


def _fault(document: object) -> str | None:
    """Why something is no document."""
    if document is None:
        return "there is no text"
    if isinstance(document, str):
        return None
    ids = np.asarray(document)
    if ids.ndim != 1 or not len(ids):
        return "there are no token ids"
    if not np.issubdtype(ids.dtype, np.integer):
        return "the token ids are no integers"
    if ids.min() < 0 or ids.max() >= 1 << 31:  # which a cast to 32 bits would make other ids of
        return "a token id is below 0 or above 2147483647"
    return None


def row_columns(method: Method) -> pa.Schema:
    """The columns of a window's row in `Scored`, in order; all may be null."""
    place = [pa.field("index", pa.int32()), pa.field("start", pa.int64()), pa.field("n_tokens", pa.int32())]
    state = [pa.field(name, pa.string()) for name in _STATE]
    return pa.schema([*place, *state, *method.columns()])


def with_windows(columns: pa.Schema) -> pa.Schema:
    """The columns of a document's best window, and `windows`, a list of the rows of all."""
    return columns.append(pa.field("windows", pa.list_(pa.struct(list(columns)))))


def check_per(per: str) -> None:
    """Refuse what is neither "document" nor "window".

    Raises:
        UsageError: it is not.
    """
    if per not in ("document", "window"):
        raise UsageError(f"per is 'document' or 'window', not '{per}'.")
