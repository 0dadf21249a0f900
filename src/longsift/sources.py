"""The files of documents that a user names, on any file system that fsspec knows: found, divided and opened."""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from longsift.errors import InputError

FORMATS = {
    **{
        ending + compression: "jsonl" + kind
        for compression, kind in {"": "", ".gz": ".gz", ".zst": ".zst", ".zstd": ".zst"}.items()
        for ending in (".jsonl", ".json", ".ndjson")
    },
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""The endings that can be read, and the format that each one means."""

_ENDINGS = ", ".join(FORMATS)

_READ_BYTES = 1 << 20
_DIVISIBLE = {"jsonl", "parquet"}  # formats that can be entered in the middle

# What `datasets` and the Hub put beside data: JSON by its ending, but not documents.
_SIDECARS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True, slots=True)
class Source:
    """One file of documents.

    Attributes:
        url: an absolute local path, or `s3://…`, `hf://…`, `https://…` without the secrets that were given in it.
        name: the path below the folder that all sources share, without its ending where it is unique so; ids
            of rows that have none begin with it.
        format: a value of `FORMATS`.
        size: bytes of the file.
        version: what the file system says of its content (an ETag, a time of change); "" where it says nothing.
        address: what fsspec opens: the url, with its secrets. Not for messages, tables or manifests.
    """

    url: str
    name: str
    format: str
    size: int
    version: str = ""
    address: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.address or self.url)

    def pieces(self, most: int) -> list[Piece]:
        """The file in pieces of about equal size, at most `most` bytes each where its format can be divided."""
        count = max(1, -(-self.size // most)) if self.format in _DIVISIBLE else 1
        bounds = [index * self.size // count for index in range(count + 1)]
        return [Piece(self, start, stop) for start, stop in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a file's bytes, which stands for the rows in it: each row of a file belongs to one of its pieces.

    Attributes:
        start, stop: of JSON lines, those that begin in this range; of Parquet, its row groups from the share `start` of
            the file's size to the share `stop`, as if they were all of one size. A compressed file is one piece.
    """

    source: Source
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether it is the whole file."""
        return self.size == self.source.size


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """List the files that the inputs name, sorted by url, each once.

    Args:
        inputs: files, folders (searched recursively), globs, datasets written by `save_to_disk`; local or on
            any fsspec file system: `s3://bucket/folder`, `hf://datasets/org/name@revision`. In folders and
            globs, files with other endings and names that begin with "." or "_" are left out.

    Raises:
        InputError: an input cannot be listed, or names no file that can be read.
    """
    found_files: dict[str, tuple[int, str]] = {}
    for given in inputs:
        found = _find(given)
        if not found:
            raise InputError(
                f"no documents in {_public(given)!r}: longsift reads files that end in {_ENDINGS}. "
                "Check the path, or quote a glob so that the shell leaves it alone"
            )
        found_files.update(found)
    addresses = {_public(address): address for address in found_files}
    if len(addresses) < len(found_files):
        raise InputError("two inputs are the same but for their query or password: give one of them")
    return _sources({url: (*found_files[address], address) for url, address in addresses.items()})


def listed_sources(listed: Sequence[tuple[str, int, str]]) -> list[Source]:
    """The sources that `find_sources` gave, from the url, size and version of each; without secrets of an address."""
    return _sources({url: (size, version, url) for url, size, version in listed})


def _sources(files: Mapping[str, tuple[int, str, str]]) -> list[Source]:
    """Sources from the size, version and address by url."""
    names = _names(sorted(files))
    return [Source(url, names[url], FORMATS[_ending(url)], *files[url]) for url in sorted(files)]


def stamp(info: Mapping[str, Any]) -> tuple[int, str]:
    """Size and version of a file, as its file system lists it."""
    known = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified")
    return int(info["size"]), next((str(info[key]) for key in known if info.get(key)), "")


def failure(error: Exception, address: str) -> str:
    """The kind of an error and what it says, without the secrets of the address that it happened with."""
    text = f"{type(error).__name__}: {error}"
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def cause(error: Exception, address: str) -> Exception | None:
    """The error for `raise … from`; None where a traceback would show the secrets of the address."""
    return None if _secrets(address) else error


@contextmanager
def open_piece(piece: Piece, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[SourceFile]:
    """Open the file of a piece.

    Args:
        on_bytes: called with the number of bytes read since its last call.

    Raises:
        InputError: it cannot be opened; or this is a part of it, and it is not the one that was found.
    """
    source = piece.source
    try:
        fs, path = fsspec.core.url_to_fs(source.address)
        # Pieces are read at different times: all have to be of the file that was found.
        found = (source.size, source.version) if piece.whole else stamp(fs.info(path))
        raw = fs.open(path, "rb")
    except Exception as error:  # each file system has its own exceptions
        raise InputError(f"cannot open {source.url}: {failure(error, source.address)}") from cause(
            error, source.address
        )
    with raw:
        if found != (source.size, source.version):
            raise InputError(_changed(source, found[0]))
        yield SourceFile(raw, source, on_bytes)


def _changed(source: Source, size: int) -> str:
    return (
        f"{source.url} changed: it had {source.size:,} bytes when the run began, and {size:,} when it was read. "
        "Run again with --overwrite once it is whole."
    )


class SourceFile:
    """A raw file that reports the bytes it gives, and whose failures cannot be taken for a damaged file."""

    closed = False

    def __init__(self, raw: BinaryIO, source: Source, on_bytes: Callable[[int], None]) -> None:
        self._raw, self._source, self._on_bytes = raw, source, on_bytes
        self.seek, self.tell = raw.seek, raw.tell

    def read(self, size: int = -1) -> bytes:
        try:
            # A damaged file may have pyarrow ask for more than it has, or than memory has.
            data = self._raw.read(min(size, max(self._source.size, 1)))
        except Exception as error:  # each file system has its own exceptions
            raise self._failed(error) from cause(error, self._source.address)
        self._on_bytes(len(data))
        return data

    def lines(self, piece: Piece) -> Iterator[bytes]:
        """The lines that begin in a piece, as chunks of bytes; at the file's end it is checked to have its size."""
        last, begun = piece.stop == self._source.size, piece.start == 0
        for chunk in self.between(piece.start - 1, None if last else piece.stop - 1):
            if not begun:
                _, newline, chunk = chunk.partition(b"\n")
                begun = bool(newline)
            if begun:
                yield chunk
        if begun and not last:
            # Here, or further on, ends the last line that begins in the piece.
            for chunk in self.between(piece.stop - 1, None):
                line, newline, _ = chunk.partition(b"\n")
                yield line + newline
                if newline:
                    return

    def between(self, start: int, stop: int | None = None) -> Iterator[bytes]:
        """Its bytes from `start`, or its beginning, to `stop`, or its end, which has to be where it was found."""
        place = max(0, start)
        try:
            self.seek(place)
        except Exception as error:  # as of a server that gives no part of a file
            raise self._failed(error) from cause(error, self._source.address)
        while stop is None or place < stop:
            chunk = self.read(_READ_BYTES if stop is None else min(_READ_BYTES, stop - place))
            if not chunk:
                if place != self._source.size:
                    raise InputError(_changed(self._source, place))
                return
            place += len(chunk)
            yield chunk

    def _failed(self, error: Exception) -> InputError:
        return InputError(f"reading {self._source.url} failed: {failure(error, self._source.address)}")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Left to the owner of the raw file; pyarrow asks for it."""


# User and password, as in https://user:password@host, or s3://key:secret@bucket with slashes in the secret; but not
# what precedes the @ of https://host:8080/a@b, hf://datasets/org/name@revision and abfs://container@account.
_LOGIN = re.compile(r"(?<=://)(?:[^/@\s:]*:(?!\d+/)[^@\s]*|(?<=http://)[^/@\s]+|(?<=https://)[^/@\s]+)@")
# Anyone who has a signed link may read what it names.
_QUERY = re.compile(r"(?<=^http)(s?://[^?]*)\?(.+)", re.DOTALL)


def _public(address: str) -> str:
    """An address without user, password and signature."""
    return _QUERY.sub(r"\1", _LOGIN.sub("", address))


def _secrets(address: str) -> set[str]:
    login, query = _LOGIN.search(address), _QUERY.search(address)
    whole = [*([login[0][:-1]] if login else []), *([query[2]] if query else [])]
    parts = [part for text in whole for part in re.split("[:&/]", text)]  # as a library may tell them
    values = [part.partition("=")[2] for part in parts]
    return {form for text in (*whole, *parts, *values) if len(text) > 2 for form in (text, unquote(text))}


def _find(given: str) -> dict[str, tuple[int, str]]:
    """Sizes by url of the files that one input names."""
    shown = repr(_public(given))
    try:
        fs, path = fsspec.core.url_to_fs(given)
        if isinstance(fs, LocalFileSystem):
            path = os.path.abspath(path)  # "a/../b" and "b" are one file
        if glob.has_magic(_public(path)) and not fs.exists(path):
            return _find_glob(fs, path)
        info = fs.info(path)
        if info["type"] == "directory":
            return _find_folder(fs, info["name"])
    except FileNotFoundError as error:
        raise InputError(f"{shown} does not exist: check the path") from cause(error, given)
    except ImportError as error:
        if given.startswith(("s3://", "s3a://")):
            raise InputError(f"reading {shown} needs s3fs: pip install 'longsift[s3]'") from cause(error, given)
        raise InputError(f"reading {shown} needs another package: {error}") from cause(error, given)
    except Exception as error:  # each file system has its own exceptions for a refused or failed listing
        raise InputError(f"cannot list {shown}: {failure(error, given)}") from cause(error, given)
    if not _ending(_public(path)):
        raise InputError(f"cannot tell the format of {shown}: longsift reads files that end in {_ENDINGS}")
    return {_url(fs, path): stamp(info)}


def _find_glob(fs: Any, pattern: str) -> dict[str, tuple[int, str]]:
    parts = pattern.split("/")
    magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:magic])
    files: dict[str, tuple[int, str]] = {}
    for path, info in fs.glob(pattern, detail=True).items():
        if _is_hidden(path, root):
            continue
        if info["type"] == "directory":
            files.update(_find_folder(fs, path))
        elif _is_data(path):
            files[_url(fs, path)] = stamp(info)
    return files


def _find_folder(fs: Any, root: str) -> dict[str, tuple[int, str]]:
    listing = fs.find(root, detail=True)
    # A folder of `save_to_disk` lists its own files; others in it are caches of `map` and `filter`.
    saved: dict[str, set[str]] = {}
    for path in listing:
        folder, name = posixpath.split(path)
        if name == "state.json" and posixpath.join(folder, "dataset_info.json") in listing:
            state = json.loads(fs.cat_file(path))
            saved[folder] = {posixpath.join(folder, file["filename"]) for file in state["_data_files"]}
    return {
        _url(fs, path): stamp(info)
        for path, info in listing.items()
        if _is_data(path) and not _is_hidden(path, root) and path in saved.get(posixpath.dirname(path), {path})
    }


def _url(fs: Any, path: str) -> str:
    if isinstance(fs, LocalFileSystem):
        return path
    return str(fs.unstrip_protocol(path))


def _ending(path: str) -> str:
    return next((ending for ending in FORMATS if path.lower().endswith(ending)), "")


def _is_data(path: str) -> bool:
    return _ending(path) != "" and posixpath.basename(path) not in _SIDECARS


def _is_hidden(path: str, root: str) -> bool:
    return any(part.startswith((".", "_")) for part in path[len(root) :].split("/"))


def _names(urls: Sequence[str]) -> dict[str, str]:
    """A short name for each file: its path below the shared folder, without the ending if all stay unique."""
    parts = [url.split("/") for url in urls]
    shared = 0
    while all(len(own) > shared + 1 and own[shared] == parts[0][shared] for own in parts):
        shared += 1
    paths = {url: "/".join(own[shared:]) for url, own in zip(urls, parts, strict=True)}
    bare = {url: path[: -len(_ending(path))] for url, path in paths.items()}
    return bare if len(set(bare.values())) == len(bare) else paths
