"""Steps for a datatrove pipeline: documents get scores in their metadata, and a filter keeps those with good ones.

Needs datatrove (`pip install 'longsift[datatrove]'`), with whose readers, writers and executors the steps work::

    SlurmPipelineExecutor([JsonlReader(...), AttentionScores(window=8192), AttentionFilter(0.5), JsonlWriter(...)], ...)
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from inspect import signature
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from longsift.engines.streams import DocumentScorer, Per, check_per, row_columns, with_windows
from longsift.errors import UsageError
from longsift.methods import Method, build_method
from longsift.scoring import Scorer

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.writers.disk_base import DiskWriter
except ImportError as error:
    raise ImportError("longsift.engines.datatrove needs datatrove: pip install 'longsift[datatrove]'") from error

_BATCH_CHARS = 1 << 22  # of documents that are measured together: several batches of a GPU
_KEY = "longsift"
_COLUMN = "calibrated"

_scorers: dict[str, DocumentScorer] = {}  # of this process: datatrove makes a step anew for every task


class AttentionScores(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Score documents; their text and the rest of their metadata stay as they are.

    `metadata[key]` is a dict: `status` ("ok", "failed", or "too short" for a document with less text than a window),
    `reason`, and of the best window `index`, `start` (in tokens), `n_tokens` and the method's columns, which are None
    unless the status is "ok". The best window is the one whose first column of the method is the largest:
    `calibrated`, `cds` or `dependency_strength`. Numbers have the same bits as a `Scorer`'s.

    Args:
        method, model: as of `longsift.Scorer`.
        window: tokens of a window; default 32,768, or what the calculator supports.
        per: "document": every document once, and `metadata[key]["windows"]` lists the same of all its windows.
            "window": every window as a document of its own, whose id is `<id>:<index>` and whose text is that which the
            window covers; a document without one passes as it is.
        key: of the metadata.
        device: "auto" gives every worker one of the GPUs that it sees (see `choose_device`).
        options: further arguments of `longsift.Scorer`: `dtype`, `batch_tokens`, the method's own parameters, ….

    Raises:
        UsageError: no such method, or a parameter that it does not have. What else a `Scorer` refuses is raised when
            the first document comes.
    """

    type = "SCORER"
    name = "longsift attention scores"

    def __init__(
        self,
        method: str = "calibrated",
        *,
        model: str = "embedded",
        window: int | None = None,
        per: Per = "document",
        key: str = _KEY,
        device: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        check_per(per)
        # No more than arguments: the step is pickled for every task.
        self.per, self.key, self.device = per, key, device
        self.options = {"method": method, "model": model, "window": window, **options}
        _method(self.options)

    def arrow_type(self) -> pa.StructType:
        """The type of `metadata[key]`, for a writer that needs a schema, such as datatrove's `ParquetWriter`."""
        columns = row_columns(_method(self.options))
        if self.per == "document":
            columns = with_windows(columns)
        return pa.struct(list(columns))

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Score the documents of a task, in order."""
        for documents in _batches(data):
            scorer = self._scorer(rank)
            with self.track_time("batch"):
                scored = scorer.score([document.text for document in documents])
            for document, outcome in zip(documents, scored, strict=True):
                self.stat_update("documents", f"documents {outcome.status}")
                for row in outcome.windows:
                    self.stat_update(f"windows {row['status']}")
                    self.stat_update("tokens", value=row["n_tokens"], unit="window")
                if self.per == "document":
                    document.metadata[self.key] = outcome.best | {"windows": outcome.windows}
                    yield document
                elif not outcome.windows:
                    document.metadata[self.key] = outcome.best
                    yield document
                else:
                    for row, text in zip(outcome.windows, outcome.texts, strict=True):
                        metadata = document.metadata | {self.key: row}
                        name = f"{document.id}:{row['index']}"
                        yield dataclasses.replace(document, text=text, id=name, metadata=metadata)

    def _scorer(self, rank: int) -> DocumentScorer:
        """The scorer of these options, loaded once a process."""
        name = repr((self.device, sorted(self.options.items())))
        if name not in _scorers:
            _scorers[name] = DocumentScorer(device=choose_device(self.device, rank), **self.options)
        return _scorers[name]


class AttentionFilter(BaseFilter):  # type: ignore[misc]
    """Keep the documents whose score, written by `AttentionScores`, is at least a threshold; all others are dropped.

    Those that are too short or failed have no score and are dropped, with `too_short` or `failed` as the reason, and
    others with `below_threshold`.

    Args:
        threshold: the least score that is kept: one for all, or one a group, as `thresholds` gives them.
        column: the score: a column of the method's.
        group_by: key of the group in the metadata; default `source` where it is a string, and else the group "all".
        key: of the scores in the metadata.
        exclusion_writer: a datatrove writer of what is dropped.
    """

    name = "longsift attention filter"

    def __init__(
        self,
        threshold: float | Mapping[str, float],
        *,
        column: str = _COLUMN,
        group_by: str | None = None,
        key: str = _KEY,
        exclusion_writer: DiskWriter | None = None,
    ) -> None:
        super().__init__(exclusion_writer)
        self.threshold = dict(threshold) if isinstance(threshold, Mapping) else float(threshold)
        self.column, self.group_by, self.key = column, group_by, key

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether a document is kept, or why not.

        Raises:
            UsageError: it has no scores or no such column, or its group has no threshold.
        """
        value = _value(doc, self.key, self.column)
        if value is None:
            return False, str(doc.metadata[self.key]["status"]).replace(" ", "_")
        least = self.threshold
        if isinstance(least, dict):
            group = _group(doc, self.group_by)
            if group not in least:
                known = ", ".join(sorted(least))
                raise UsageError(
                    f"Document {doc.id!r} is of the group '{group}', which has no threshold ({known} have)."
                )
            least = least[group]
        return value >= least or (False, "below_threshold")


def thresholds(
    documents: Iterable[Document],
    keep: float,
    *,
    column: str = _COLUMN,
    group_by: str | None = None,
    key: str = _KEY,
) -> dict[str, float]:
    """The thresholds at which an `AttentionFilter` keeps the best share of every group.

    It keeps ⌈keep · n⌉ of a group's n documents (or windows) that have a score, and with them those that score the same
    as the last. Windows of one document that overlap are two; `longsift select` tells them. Memory holds 8 bytes a
    document.

    Args:
        documents: scored ones, such as a reader gives: `thresholds(JsonlReader("scored").run(), 0.125)`.
        keep: share of every group, above 0 and at most 1.
        column, group_by, key: as of `AttentionFilter`.

    Returns:
        The least score that is kept, by group; a group without a score has none.

    Raises:
        UsageError: a share out of range; a document without scores or without such a column.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep is a share above 0 and at most 1, not {keep}.")
    values: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    for document in documents:
        value = _value(document, key, column)
        if value is not None:
            values[_group(document, group_by)].append(value)
    least = {}
    for group in sorted(values):
        scores = np.frombuffer(values[group])
        place = len(scores) - math.ceil(Fraction(str(keep)) * len(scores))
        least[group] = float(np.partition(scores, place)[place])
    return least


def _method(options: Mapping[str, Any]) -> Method:
    """The method that options of a `DocumentScorer` ask for."""
    others = {*signature(Scorer).parameters, "window"}
    own = {name: value for name, value in options.items() if name not in others}
    return build_method(options["method"], **own)


def choose_device(device: str, rank: int) -> str:
    """The device of a worker whose first task is `rank`.

    "auto" is the CPU where no GPU is seen, the GPU where Slurm or `CUDA_VISIBLE_DEVICES` leaves one, and else GPU
    `rank` modulo their number: the first tasks of a node's workers are consecutive, so the GPUs get equally many.
    """
    if device != "auto":
        return device
    gpus = torch.cuda.device_count()
    return f"cuda:{rank % gpus}" if gpus else "cpu"


def _batches(data: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, each list closed by the one that makes it `_BATCH_CHARS` characters or more."""
    batch: list[Document] = []
    held = 0
    for document in data:
        batch.append(document)
        held += len(document.text)
        if held >= _BATCH_CHARS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _value(document: Document, key: str, column: str) -> float | None:
    """A document's score; None where it was not measured."""
    scores = document.metadata.get(key)
    if not isinstance(scores, dict) or "status" not in scores:
        raise UsageError(f"Document {document.id!r} has no scores under '{key}': put AttentionScores before.")
    if scores["status"] != "ok":
        return None
    value = scores.get(column)
    if not isinstance(value, float):
        numbers = ", ".join(name for name, each in scores.items() if isinstance(each, float))
        raise UsageError(f"Document {document.id!r} has no score '{column}'; it has {numbers}. Give one as column.")
    return value


def _group(document: Document, group_by: str | None) -> str:
    if group_by is None:
        source = document.metadata.get("source")
        return source if isinstance(source, str) and source else "all"
    if group_by not in document.metadata:
        raise UsageError(f"Document {document.id!r} has no '{group_by}' in its metadata, by which to group.")
    return str(document.metadata[group_by])
