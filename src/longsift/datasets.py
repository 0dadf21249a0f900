"""Write the kept windows as a data set that `datasets.load_dataset` reads unchanged, with a card that says
how it was made.

The folder `selected/` is built beside its place and then exchanged, so that a reader never sees two
selections mixed. The documents' own metadata become columns: a first pass over the metadata of the kept
windows finds their types, and then texts and ids are streamed once. A data set without texts and ids is made
of the scores alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

from longsift import __version__
from longsift.errors import OutputError, UsageError
from longsift.selection import Choice

_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "window_id": (pa.string(), "the window: id of the document, a colon, number of the window"),
    "doc_id": (pa.string(), "the document that it was cut from"),
    "group": (pa.string(), "the group that it was ranked in"),
    "n_tokens": (pa.int32(), "its tokens, special tokens included"),
    "score": (pa.float64(), "the score; comparable within a group"),
    "rank": (pa.int64(), "1 = the best score of its group"),
    "text": (pa.string(), "the characters that it covers; null for rows given as token ids"),
    "input_ids": (pa.list_(pa.int32()), "its token ids"),
}
_Block = TypeVar("_Block")
_PART_BYTES = 256 << 20
_ROW_GROUP_BYTES = 32 << 20
_BATCH_ROWS = 32  # windows held at once while reading
_BATCH_SCORES = 1 << 16  # rows of scores held at once
_RECORD_FIELDS = 256  # an object with more keys is a map from data to data, not a record with columns


@dataclass(frozen=True)
class Written:
    """What `write_dataset` wrote: the folder, its data files, rows and tokens."""

    folder: Path
    files: tuple[str, ...]
    rows: int
    tokens: int


def write_dataset(
    choice: Choice,
    windows: Path,
    out: Path,
    *,
    format: Literal["parquet", "jsonl"] = "parquet",
    text: bool = True,
    input_ids: bool = True,
    card: Mapping[str, Any],
) -> Written:
    """Write the kept windows and their card to `out`/selected, in place of what was there.

    Rows stand in the order of the windows table. With text or ids, every top-level key of a document's metadata
    becomes a column of one type. A key whose values have no common type is written as JSON text; one that has the name
    of a column of ours gets the prefix `doc_`.

    Args:
        choice: what to keep.
        windows: folder of the windows table; its files have the names and the rows of the score files. Not needed
            without text and ids.
        out: the run's folder.
        format: "parquet" (part-<digest>-00000.parquet, zstd) or "jsonl" (part-<digest>-00000.jsonl.zst); a new
            part begins after 256 MiB.
        text, input_ids: whether to write these columns.
        card: facts for the card, shown in their order: `method`, `parameters` (a dict), `model`, `revision`,
            `window`, `group_by`, … A key `citation` gets a section of its own; `set_aside`, `shards` and
            `windows` that could not be scored, a sentence; keep, budget and mix are those of `choice`. The card holds
            no time but what is passed here, so that the same selection has the same bytes.

    Raises:
        UsageError: an unknown format.
        OutputError: the windows are not those that were scored.
    """
    if format not in ("parquet", "jsonl"):
        raise UsageError(f"--format takes parquet or jsonl, not '{format}'.")
    left_out = {name for name, wanted in (("text", text), ("input_ids", input_ids)) if not wanted}
    own = {name: kind for name, (kind, _) in _COLUMNS.items() if name not in left_out}
    if text or input_ids:
        metadata = _Metadata.of(table.column("metadata") for table in _take(choice, windows, ["metadata"]))
    else:
        metadata = _Metadata(())
    schema = pa.schema([*own.items(), *((column.name, column.type) for column in metadata.columns)])
    stored = [name for name in own if name not in ("score", "rank")]
    if text or input_ids:
        rows = _take(choice, windows, [*stored, "metadata"])
    else:
        rows = _take(choice, choice.scores, stored, _BATCH_SCORES)
    prefix = f"part-{_digest(choice, schema)}"
    with _replaced_folder(out / "selected") as folder:
        if format == "parquet":
            tables = _gathered((_flat(table, metadata, schema) for table in rows), schema)
            files = _write_parts(tables, folder, prefix, "parquet", lambda sink: _parquet_writer(sink, schema))
        else:
            lines = (_lines(table, metadata, list(own)) for table in rows)
            files = _write_parts(lines, folder, prefix, "jsonl.zst", _zstd_writer)
        suffix = "parquet" if format == "parquet" else "jsonl.zst"
        page = _card(choice, card, schema, f"{prefix}-*.{suffix}")
        (folder / "README.md").write_text(page, encoding="utf-8")
    return Written(out / "selected", files, choice.kept, choice.kept_tokens)


def _take(choice: Choice, windows: Path, columns: list[str], batch_rows: int = _BATCH_ROWS) -> Iterator[pa.Table]:
    """The kept rows of the windows (or scores) table, `batch_rows` at a time, with their score and rank."""
    for shard, chosen in choice.chosen():
        path = windows / f"{shard}.parquet"
        try:
            parquet = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise OutputError(
                f"{path} cannot be read ({error}); its scores were. Cut the windows again with --overwrite."
            ) from error
        wanted = chosen.column("row").to_numpy()
        if wanted[-1] >= parquet.metadata.num_rows:
            raise _other_windows(path)
        first = 0
        for index in range(parquet.metadata.num_row_groups):
            last = first + parquet.metadata.row_group(index).num_rows
            if wanted.searchsorted(first) == wanted.searchsorted(last):
                first = last
                continue
            read = list(dict.fromkeys(["window_id", *columns]))
            for batch in parquet.iter_batches(batch_size=batch_rows, row_groups=[index], columns=read):
                start, end = wanted.searchsorted(first), wanted.searchsorted(first + len(batch))
                if start < end:
                    rows = chosen.slice(start, end - start)
                    table = pa.Table.from_batches([batch]).take(pa.array(wanted[start:end] - first))
                    if table.column("window_id").to_pylist() != rows.column("window_id").to_pylist():
                        raise _other_windows(path)
                    yield table.append_column("score", rows.column("score")).append_column("rank", rows.column("rank"))
                first += len(batch)


def _other_windows(path: Path) -> OutputError:
    return OutputError(f"{path} does not hold the windows that were scored. Score them again with --overwrite.")


# --- metadata: from a JSON object a document to columns -------------------------------------------------


@dataclass
class _Shape:
    """The narrowest type that holds every value seen so far.

    pyarrow's own inference is not used: it takes [1, "x"] for integers, and its answer depends on how the
    rows are split into batches.
    """

    kind: str = "null"  # null bool int long float string list record mixed
    items: _Shape | None = None
    fields: dict[str, _Shape] = field(default_factory=dict)

    def see(self, value: Any) -> None:
        if value is None or self.kind == "mixed":
            return
        kind = _kind(value)
        if self.kind in ("null", kind):
            self.kind = kind
        else:
            self.kind = _WIDER.get(frozenset((self.kind, kind)), "mixed")
        if self.kind == "list":
            self.items = self.items or _Shape()
            for item in value:
                self.items.see(item)
        elif self.kind == "record":
            for key, item in value.items():
                self.fields.setdefault(key, _Shape()).see(item)

    def type(self) -> pa.DataType | None:
        """The Arrow type, or None when no type but JSON text holds the values."""
        if self.kind == "list":
            inner = self.items.type() if self.items else None
            return None if inner is None else pa.list_(inner)
        if self.kind == "record":
            types = {key: shape.type() for key, shape in self.fields.items()}
            if not 0 < len(types) <= _RECORD_FIELDS or None in types.values():
                return None
            return pa.struct(list(types.items()))
        return _ARROW.get(self.kind)


_ARROW = {
    "null": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "long": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
}
_WIDER = {frozenset(("int", "long")): "long", frozenset(("int", "float")): "float"}


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= 1 << 53:  # a float holds it exactly
            return "int"
        return "long" if -(1 << 63) <= value < 1 << 63 else "mixed"
    return {float: "float", str: "string", list: "list", dict: "record"}[type(value)]


@dataclass(frozen=True)
class _Column:
    """A top-level metadata key, the column that it becomes, and whether its values become JSON text."""

    key: str
    name: str
    type: pa.DataType
    as_json: bool

    def value(self, metadata: Mapping[str, Any]) -> Any:
        value = metadata.get(self.key)
        if self.as_json and value is not None:
            return json.dumps(value, ensure_ascii=False)
        return value


@dataclass(frozen=True)
class _Metadata:
    """The columns that the documents' metadata become, in the order in which their keys were first seen."""

    columns: tuple[_Column, ...]

    @classmethod
    def of(cls, chunks: Iterator[pa.ChunkedArray]) -> _Metadata:
        shapes: dict[str, _Shape] = {}
        for chunk in chunks:
            for row in _parsed(chunk):
                for key, value in row.items():
                    shapes.setdefault(key, _Shape()).see(value)
        columns = []
        taken = set(_COLUMNS) | set(shapes)
        for key, shape in shapes.items():
            name = key
            while name in _COLUMNS or (name != key and name in taken):
                name = f"doc_{name}"
            taken.add(name)
            kind = shape.type()
            columns.append(_Column(key, name, pa.string() if kind is None else kind, as_json=kind is None))
        return cls(tuple(columns))


def _parsed(metadata: pa.ChunkedArray) -> list[dict[str, Any]]:
    return [_parse(text) if text else {} for text in metadata.to_pylist()]


def _parse(text: str) -> dict[str, Any]:
    # JSON has no NaN or Infinity, and readers stop at them; Python's reader takes them.
    value: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    if "\\ud" in text.lower():  # half of a surrogate pair has no UTF-8
        whole = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        value = json.loads(whole)
    return value


# --- rows of the data set -------------------------------------------------------------------------------


def _flat(table: pa.Table, metadata: _Metadata, schema: pa.Schema) -> pa.Table:
    """Rows with the metadata as typed columns."""
    parsed = _parsed(table.column("metadata")) if metadata.columns else []
    columns = {column.name: pa.array(map(column.value, parsed), column.type) for column in metadata.columns}
    arrays = [
        columns[field.name] if field.name in columns else table.column(field.name).cast(field.type) for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _gathered(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of the size of a row group; one empty table when there are no rows."""
    held = [schema.empty_table()]
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size >= _ROW_GROUP_BYTES:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held:
        yield pa.concat_tables(held)


def _lines(table: pa.Table, metadata: _Metadata, own: list[str]) -> bytes:
    """Rows as JSON lines; a document has the metadata keys that it came with."""
    rows = table.select(own).to_pylist()
    if not metadata.columns:
        return _json_lines(rows)
    for row, parsed in zip(rows, _parsed(table.column("metadata")), strict=True):
        row |= {column.name: column.value(parsed) for column in metadata.columns if column.key in parsed}
    return _json_lines(rows)


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# --- files ----------------------------------------------------------------------------------------------


@contextmanager
def _replaced_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path`, and put it in its place when the block ends well."""
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for leftover in (fresh, old):
        _remove(leftover)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    finally:
        _remove(fresh)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _write_parts(
    blocks: Iterator[_Block],
    folder: Path,
    prefix: str,
    suffix: str,
    writer: Callable[[BinaryIO], AbstractContextManager[Callable[[_Block], Any]]],
) -> tuple[str, ...]:
    """Write blocks into <prefix>-00000, <prefix>-00001, …; at least one part, even without a block."""
    names: list[str] = []
    block = next(blocks, None)
    while block is not None or not names:
        names.append(f"{prefix}-{len(names):05d}.{suffix}")
        with (folder / names[-1]).open("wb") as sink:
            with writer(sink) as write:
                while block is not None and sink.tell() < _PART_BYTES:
                    write(block)
                    block = next(blocks, None)
            sink.flush()
            os.fsync(sink.fileno())
    return tuple(names)


@contextmanager
def _parquet_writer(sink: BinaryIO, schema: pa.Schema) -> Iterator[Callable[[pa.Table], Any]]:
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        yield writer.write_table


@contextmanager
def _zstd_writer(sink: BinaryIO) -> Iterator[Callable[[bytes], Any]]:
    with zstandard.ZstdCompressor().stream_writer(sink, closefd=False) as writer:
        yield writer.write


# --- the card -------------------------------------------------------------------------------------------


def _digest(choice: Choice, schema: pa.Schema) -> str:
    """Eight digits of what is selected. `datasets` caches by the names in the card, so other rows need other names."""
    state = hashlib.sha256(str(schema).encode())
    for shard, table in choice.chosen():
        state.update("\0".join([shard, *table["window_id"].to_pylist()]).encode())
        for name in ("row", "score", "rank"):
            state.update(table[name].to_numpy().tobytes())
    return state.hexdigest()[:8]


def _set_aside(facts: Mapping[str, Any]) -> str:
    missing = facts.get("set_aside") or {"shards": 0}
    if not missing["shards"]:
        return ""
    return (
        f"{missing['windows']:,} further windows, of {missing['shards']:,} shards that could not be scored, "
        "were never ranked and are left out. "
    )


def _card(choice: Choice, facts: Mapping[str, Any], schema: pa.Schema, files: str) -> str:
    front: dict[str, Any] = {
        "tags": ["long-context", "longsift"],
        "size_categories": [_size_category(choice.kept)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}],
    }
    if files.endswith(".jsonl.zst"):
        # Without types, the first megabytes of a JSON file decide them, and a later key is an error.
        front["dataset_info"] = {"features": [{"name": f.name, **_feature(f.type)} for f in schema]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        "# Long-context training data, selected by longsift",
        f"{choice.kept:,} of {choice.windows:,} windows ({choice.kept_tokens:,} of {choice.tokens:,} tokens) "
        "were kept by how much each window depends on its far past, ranked within its group. "
        + (f"{choice.failed:,} windows could not be measured and were left out. " if choice.failed else "")
        + _set_aside(facts)
        + (f"{choice.duplicates:,} windows hold the same tokens as others. " if choice.duplicates else "")
        + (f"{choice.passed_over:,} overlap better ones and were passed over. " if choice.passed_over else "")
        + (f"{choice.overlapping:,} of the kept ones overlap better ones. " if choice.overlapping else "")
        + "The texts keep the terms of their sources; this card grants no license.",
        "## How it was made",
        _table(["what", "value"], [[key, value] for key, value in _facts(choice, facts)]),
        "## Groups",
        _table(
            ["group", "windows", "tokens", "kept windows", "kept tokens", "best score", "lowest kept score"],
            [[g.group, g.windows, g.tokens, g.kept, g.kept_tokens, g.best, g.cut] for g in choice.groups]
            + [["**all**", choice.windows, choice.tokens, choice.kept, choice.kept_tokens, None, None]],
        ),
    ]
    short = [quota for quota in choice.quotas if quota.shortfall]
    if short:
        parts += [
            "Asked for and not available:",
            "\n".join(
                f"- {_cell(', '.join(quota.groups) or 'groups that the mix does not name')}: "
                f"{quota.shortfall:,} of {quota.tokens:,} tokens"
                for quota in short
            ),
        ]
    described = [
        [
            f"`{f.name}`",
            str(f.type),
            _COLUMNS[f.name][1] if f.name in _COLUMNS else "metadata of the document",
        ]
        for f in schema
    ]
    parts += ["## Columns", _table(["column", "type", "what"], described)]
    if facts.get("citation"):
        parts += ["## Citation", _cell(facts["citation"])]
    return "\n\n".join(parts) + "\n"


def _facts(choice: Choice, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if key in ("citation", "keep", "budget", "mix", "set_aside") or value is None or value == {}:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{name}={part}" for name, part in value.items())
        yield key.replace("_", " "), str(value)
    yield "score", choice.rule.describe()
    if choice.keep is not None:
        yield "keep", f"{choice.keep:g} of every group"
    if choice.budget is not None:
        yield "budget", f"{choice.budget:,} tokens"
    if choice.mix is not None:
        yield "mix", ", ".join(f"{group}={share:g}" for group, share in choice.mix.items())
    yield "tool", f"longsift {__version__}"


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """The type in the words of a data set card."""
    if pa.types.is_list(kind):
        inner = _feature(kind.value_type)
        return {"list": inner.get("dtype") or inner.get("struct") or inner}
    if pa.types.is_struct(kind):
        return {
            "struct": [{"name": kind.field(i).name, **_feature(kind.field(i).type)} for i in range(kind.num_fields)]
        }
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind))}


def _size_category(rows: int) -> str:
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    sizes = [10**exponent for exponent in range(3, 10)]
    for i, size in enumerate(sizes):
        if rows < size:
            return f"n<{bounds[0]}" if i == 0 else f"{bounds[i - 1]}<n<{bounds[i]}"
    return "n>1B"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
