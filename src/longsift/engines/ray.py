"""A stateful function for Ray Data: rows of text or token ids get score columns, with one calculator an actor.

It uses no name of Ray, and so can be imported without it; to run it, `pip install 'longsift[ray]'`::

    ds.map_batches(
        AttentionScores, fn_constructor_kwargs={"window": 8192}, batch_format="pyarrow", batch_size=64,
        num_gpus=1, compute=ray.data.ActorPoolStrategy(size=8),
    )
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pyarrow as pa

from longsift.engines.streams import DocumentScorer, Per, check_per, with_windows
from longsift.errors import UsageError


class AttentionScores:
    """Score the rows of a batch; a callable class for `Dataset.map_batches`, to be called with Arrow tables.

    The columns that it adds, after `prefix`: `index` and `start` (in tokens) of a window in its document, `n_tokens`,
    `status` ("ok", "failed", or "too short" for a text with less than a window), `reason`, and the method's columns,
    null unless the status is "ok". Numbers have the same bits as a `Scorer`'s.

    Args:
        method, model: as of `longsift.Scorer`.
        column: of texts, which are cut into windows, or of lists of token ids, each of which is one window as it is.
        window: tokens of a window of text; default 32,768, or what the calculator supports.
        per: "document": every row once, with the columns of its best window (whose first column of the method is the
            largest) and, in a further column `windows`, a list of those of all. "window": a row a window, with
            `column` cut down to it; a row without a window stays.
        prefix: of the names of the columns that are added.
        options: further arguments of `longsift.Scorer`: `device`, `dtype`, the method's own parameters, …. Ray shows
            an actor the GPU that `num_gpus=1` reserves and no other, and `device="auto"` takes that.

    Raises:
        UsageError: a parameter that the method does not have; a window too short for it.
        ModelError: a calculator that cannot be loaded.
    """

    def __init__(
        self,
        method: str = "calibrated",
        *,
        model: str = "embedded",
        column: str = "text",
        window: int | None = None,
        per: Per = "document",
        prefix: str = "",
        **options: Any,
    ) -> None:
        check_per(per)
        self._per, self._column, self._prefix = per, column, prefix
        self._scorer = DocumentScorer(method, model=model, window=window, **options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows of a batch with their scores.

        Raises:
            UsageError: no Arrow table; no such column of texts or ids; a column that is to be added is there already.
        """
        self._check(batch)
        scored = self._scorer.score([_plain(value) for value in batch[self._column]])
        columns = self._scorer.columns
        if self._per == "document":
            columns = with_windows(columns)
            rows = [outcome.best | {"windows": outcome.windows} for outcome in scored]
        else:
            each = [outcome.windows or [outcome.best] for outcome in scored]
            rows = list(chain.from_iterable(each))
            batch = batch.take(pa.array([i for i, some in enumerate(each) for _ in some], pa.int64()))
            if _is_text(batch.schema.field(self._column).type):
                texts = chain.from_iterable(outcome.texts or [None] for outcome in scored)
                whole = batch[self._column].to_pylist()
                cut = [all_ if text is None else text for text, all_ in zip(texts, whole, strict=True)]
                place = batch.schema.get_field_index(self._column)
                kind = batch.schema.field(place)
                batch = batch.set_column(place, kind, pa.array(cut, kind.type))
        added = pa.Table.from_pylist(rows, schema=columns)
        for name in columns.names:
            batch = batch.append_column(self._prefix + name, added[name])
        return batch

    def _check(self, batch: object) -> None:
        if not isinstance(batch, pa.Table):
            raise UsageError("AttentionScores takes Arrow tables: give map_batches batch_format='pyarrow'.")
        if self._column not in batch.column_names:
            raise UsageError(f"There is no column '{self._column}'; there are {', '.join(batch.column_names)}.")
        kind = batch.schema.field(self._column).type
        if not _is_text(kind) and not _is_ids(kind) and not pa.types.is_null(kind):
            raise UsageError(
                f"The column '{self._column}' is of type {kind}; it must hold texts or lists of token ids."
            )
        names = [*self._scorer.columns.names, *(["windows"] if self._per == "document" else [])]
        added = [self._prefix + name for name in names]
        if taken := [name for name in added if name in batch.column_names]:
            raise UsageError(f"There are columns {', '.join(taken)} already: give AttentionScores a prefix.")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_ids(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(lists and pa.types.is_integer(kind.value_type))


def _plain(value: pa.Scalar) -> Any:
    """A text, an array of ids, or None."""
    if not value.is_valid:
        return None
    ids = getattr(value, "values", None)
    return value.as_py() if ids is None else ids.to_numpy(zero_copy_only=False)
