"""What a row of a source becomes: a `Document`, or a `BadRow` with the reason why it is none."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longsift.sources import Source

_EXCERPT_CHARS = 200
EXCERPT_BYTES = 4 * _EXCERPT_CHARS
"""Of a row that is too long to be held: enough for its excerpt."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How rows become documents.

    Attributes:
        text_key: column of the text. As in the two below, a dotted path such as `meta.body` reaches into
            objects, unless a column has that very name.
        id_key: column of the id, a string or an integer.
        group_by: column of the group; None takes `source` where it is a string, and else the group "all".
        tab_ids: JSON lines are `id<TAB>{json}`.
        max_document_bytes: longer rows are bad rows; lines are skipped without being held in memory. A line takes
            about 20 times its bytes while it is parsed and tokenised.
        max_ids: rows that are given as more token ids than that are bad rows. Such a row is one window, and scoring
            it takes memory in proportion to its length.
    """

    text_key: str = "text"
    id_key: str = "id"
    group_by: str | None = None
    tab_ids: bool = False
    max_document_bytes: int = 1 << 25
    max_ids: int = 1 << 20


@dataclass(slots=True)
class Document:
    """One row: a text, or the token ids that it was given as.

    Attributes:
        doc_id: the row's own id, or `<source name>:<row>`.
        text: not blank, without lone surrogates and NUL; None only where `input_ids` is given without text.
        input_ids: (n,) int32, n ≥ 1; None for a row of text.
        group: the category within which scores are compared.
        metadata: the other columns, as values that `json.dumps` writes as valid JSON.
        file, row: url of the source, and 0-based line or row in it.
    """

    doc_id: str
    text: str | None
    input_ids: npt.NDArray[np.int32] | None
    group: str
    metadata: dict[str, Any]
    file: str
    row: int


@dataclass(slots=True)
class BadRow:
    """A row that is no document, or the part of a file that could not be read.

    Attributes:
        file: url of the source.
        row: 0-based line or row; None when the whole file is meant.
        reason: short, and the same for every row with that fault.
        excerpt: first characters of the row, or what exactly failed, as printable ASCII.
    """

    file: str
    row: int | None
    reason: str
    excerpt: str


class Reject(Exception):
    """A row is no document; its text is the reason."""


_ABSENT = object()


def document_of(row: dict[str, Any], source: Source, number: int, options: ReadOptions) -> Document:
    """Check one row. Raises `Reject` with the reason when it is no document."""
    rest = dict(row)
    text = _take(rest, options.text_key)
    given_id = _take(rest, options.id_key)
    ids = rest.pop("input_ids", None)
    input_ids = None if ids is None else _token_ids(ids, options.max_ids)
    if input_ids is not None and text in (_ABSENT, None, ""):
        text = None
    else:
        _check_text(text, options.text_key)
    return Document(
        doc_id=_doc_id(given_id, f"{source.name}:{number}"),
        text=text,
        input_ids=input_ids,
        group=_group(row, options.group_by),
        metadata={_json_value(key): _json_value(value) for key, value in rest.items()},
        file=source.url,
        row=number,
    )


def too_long(options: ReadOptions) -> str:
    return f"longer than {options.max_document_bytes:,} bytes"


def missing(what: str, key: str) -> str:
    return f"missing {what} key {key!r}"


def _take(row: dict[str, Any], path: str) -> Any:
    """Remove and return the value at a path; objects on the way are copied, not changed."""
    if path in row:
        return row.pop(path)
    head, _, tail = path.partition(".")
    if not tail or not isinstance(row.get(head), dict):
        return _ABSENT
    row[head] = dict(row[head])
    return _take(row[head], tail)


def _check_text(text: object, key: str) -> None:
    if text is _ABSENT:
        raise Reject(missing("text", key))
    if text is None:
        raise Reject("text is null")
    if not isinstance(text, str):
        raise Reject("text is not a string")
    if not text or text.isspace():
        raise Reject("text is empty")
    if "\0" in text:
        raise Reject("text holds a NUL character")
    if not _is_unicode(text):
        raise Reject("text holds a lone surrogate")


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can smuggle in lone surrogates, such as "\\ud800"."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _token_ids(values: Any, most: int) -> npt.NDArray[np.int32]:
    if not isinstance(values, list | np.ndarray):
        raise Reject("input_ids is not a list")
    if len(values) == 0:
        raise Reject("input_ids is empty")
    if len(values) > most:
        raise Reject(f"more than {most:,} token ids")
    if isinstance(values, list) and set(map(type, values)) != {int}:
        raise Reject("input_ids holds something other than integers")
    # numpy's own min and max would turn Python integers beyond 64 bits into an error.
    lowest, highest = (min(values), max(values)) if isinstance(values, list) else (values.min(), values.max())
    if lowest < 0 or highest >= 1 << 31:
        raise Reject("input_ids holds an integer below 0 or above 2147483647")
    return np.array(values, dtype=np.int32)


def _doc_id(value: object, default: str) -> str:
    if value is _ABSENT or value is None or value == "":
        return default
    return _name(value, "id")


def _group(row: dict[str, Any], key: str | None) -> str:
    if key is None:
        source = row.get("source")
        return _name(source, "group") if isinstance(source, str) and source else "all"
    value = _take(dict(row), key)
    if value is _ABSENT or value is None or value == "":
        raise Reject(missing("group", key))
    return _name(value, "group")


def _name(value: object, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Reject(f"{what} is neither a string nor an integer")
    if not _is_unicode(name := str(value)):
        raise Reject(f"{what} holds a lone surrogate")
    return name


def _json_value(value: Any) -> Any:
    """The value as `json.dumps` can write it in valid JSON: NaN as null, dates as text, bytes in base64."""
    match value:
        case str():
            return value if _is_unicode(value) else value.encode("utf-8", "replace").decode("utf-8")
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {_json_value(str(key)): _json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(item) for item in value]
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case _:
            return str(value)


def excerpt(content: str | bytearray) -> str:
    """The first characters, escaped to printable ASCII."""
    if isinstance(content, bytearray):
        content = content[:EXCERPT_BYTES].decode("utf-8", "surrogateescape")
    return content[:_EXCERPT_CHARS].encode("unicode_escape").decode("ascii")
