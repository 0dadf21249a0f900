"""Find a checkpoint, and read from it the tensors that are needed and no other bytes.

A safetensors file is an 8-byte length, a JSON header of that length with the type, shape and byte range of
every tensor, and the bytes. So a few tensors of a checkpoint of hundreds of gigabytes cost a few range requests,
wherever it lies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from longsift.errors import ModelError

# What a read can end with. The hub's client has changed its HTTP library twice; the base of its own error is the
# base of that library's errors (or an OSError anyway), broken connections included.
_FAILURES: tuple[type[BaseException], ...] = (OSError, HfHubHTTPError.__bases__[0])

EMBEDDED = Path(__file__).parent / "embedded"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PIECE = 64 * 1024 * 1024  # bytes a request: a lost connection costs one piece, not an embedding of gigabytes
_SAMPLE = 64 * 1024  # bytes at each of three places of a file that tell it from another with the same header
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint lies.

    Attributes:
        name: what the user called it.
        folder: path or fsspec URL of the folder that holds it.
        pretrained: what transformers reads its configuration from: a local folder or a hub id.
        revision: the commit on the hub; None for a local folder.
        weights: file name of its one safetensors file, or of the index of several.
    """

    name: str
    folder: str
    pretrained: str
    revision: str | None
    weights: str

    @property
    def is_remote(self) -> bool:
        return "://" in self.folder

    def downloaded(self) -> Location:
        """This checkpoint as a local folder, fetched whole from the hub where it is not local yet."""
        if not self.is_remote:
            return self
        try:
            folder = huggingface_hub.snapshot_download(
                self.pretrained, revision=self.revision, allow_patterns=["*.json", "*.safetensors", "*.py"]
            )
        except _FAILURES as error:
            raise _unreachable(self.pretrained, error) from error
        return Location(self.name, folder, folder, self.revision, self.weights)


def locate(model: str, revision: str | None = None) -> Location:
    """Find the checkpoint that `model` names.

    Args:
        model: "embedded" (the calculator of this package), a folder, a `.safetensors` file with its
            `config.json` beside it, or a hub id `org/name` or `org/name@revision`. A hub model is taken from
            the local cache when it is there as a whole.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: nothing is there, it holds no safetensors, or the hub cannot be reached.
    """
    path = EMBEDDED if model == "embedded" else Path(model).expanduser()
    if revision is not None and path.exists():
        raise ModelError(f"--revision {revision} is for a hub id; '{model}' is on this machine and has no revisions.")
    if path.is_dir():
        return _in_folder(model, path)
    if path.is_file():
        return _single_file(model, path)
    hub = _HUB_ID.fullmatch(model)
    if hub is None or model.startswith((".", "~")):
        raise ModelError(
            f"There is no model '{model}': no such folder, no such .safetensors file, and it is no hub id "
            "(org/name or org/name@revision). Give one of these, or 'embedded'."
        )
    if revision is not None and hub["revision"] is not None and revision != hub["revision"]:
        raise ModelError(f"'{model}' names a revision and --revision {revision} another: give one of them.")
    return _on_hub(model, hub["repo"], revision or hub["revision"])


def _in_folder(name: str, folder: Path, revision: str | None = None) -> Location:
    if not folder.is_dir():
        raise ModelError(f"The model '{name}' should be in {folder}, and there is no such folder.")
    weights = _weights_among(name, [entry.name for entry in folder.iterdir()])
    return Location(name, str(folder), str(folder), revision, weights)


def _single_file(name: str, path: Path) -> Location:
    if path.suffix != ".safetensors":
        raise _not_safetensors(name, path.name)
    if not (path.parent / "config.json").is_file():
        raise ModelError(f"'{name}' has no config.json beside it; put the model's config.json into {path.parent}.")
    return Location(name, str(path.parent), str(path.parent), None, path.name)


def _on_hub(name: str, repo: str, revision: str | None) -> Location:
    try:
        cached = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        cached = None
    except HFValidationError as error:
        raise ModelError(f"There is no model '{name}': no such folder, and it cannot be a hub id ({error}).") from error
    if cached is not None and _is_whole(cached):
        return _in_folder(name, cached, cached.name)
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
    except GatedRepoError as error:
        raise ModelError(
            f"The model {repo} is gated: accept its terms on its page, then `hf auth login` with that account."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"The model {repo} has no revision '{revision}'.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model '{name}': no folder of that name here, and no public model {repo} on the hub. "
            "For a private one, `hf auth login` first."
        ) from error
    except _FAILURES as error:
        raise _unreachable(repo, error) from error
    weights = _weights_among(name, [entry.rfilename for entry in info.siblings or ()])
    return Location(name, f"hf://{repo}@{info.sha}", repo, info.sha, weights)


def _is_whole(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    if (folder / INDEX).is_file():
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    return (folder / SINGLE).is_file()


def _weights_among(name: str, files: list[str]) -> str:
    if "config.json" not in files:
        ggufs = [file for file in files if file.endswith(".gguf")]
        if ggufs:
            raise _not_safetensors(name, ggufs[0])
        raise ModelError(f"'{name}' holds no config.json, so it is not a checkpoint that transformers can read.")
    for weights in (INDEX, SINGLE):
        if weights in files:
            return weights
    single = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if len(single) == 1:
        return single[0]
    other = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf"))]
    if other:
        raise _not_safetensors(name, other[0])
    raise ModelError(f"'{name}' holds no weights: looked for {INDEX}, {SINGLE} and a single .safetensors file.")


def _not_safetensors(name: str, file: str) -> ModelError:
    if file.endswith(".gguf"):
        return ModelError(
            f"'{name}' is GGUF ({file}); longsift reads safetensors only. Use the checkpoint that it was made from."
        )
    return ModelError(
        f"'{name}' keeps its weights in {file}; longsift reads safetensors only, since a pickle can run any code. "
        "Convert it once, where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)."
    )


def _unreachable(repo: str, error: BaseException) -> ModelError:
    return ModelError(
        f"The model {repo} is not in the local cache as a whole and the hub cannot be reached "
        f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}). Download it "
        f"where there is a network with `hf download {repo}`, or pass the path of a local folder."
    )


class Checkpoint:
    """The tensors of a checkpoint, read by byte range.

    Attributes:
        bytes_read: how many bytes of weight files and their headers and index were read so far.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.bytes_read = 0
        self._fs, root = fsspec.core.url_to_fs(location.folder)
        self._root = root.rstrip("/")
        self._headers: dict[str, tuple[dict[str, Any], int, int]] = {}
        self._file_of = self._read_index()

    def prefix_of(self, names: Sequence[str]) -> str | None:
        """The one prefix, such as "model.", under which it holds every one of a model's `names`; else None."""
        first = names[0]
        prefixes = {stored.removesuffix(first) for stored in self._file_of if f".{stored}".endswith(f".{first}")}
        complete = [prefix for prefix in prefixes if all(prefix + name in self._file_of for name in names)]
        return complete[0] if len(complete) == 1 else None

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, in the type that they are stored in.

        Raises:
            ModelError: no such tensor, a file that is missing, cut short or damaged, or a type that is not plain
                floats.
        """
        by_file = defaultdict(list)
        for name in names:
            if name not in self._file_of:
                raise ModelError(f"{self.location.name} holds no tensor '{name}'.")
            by_file[self._file_of[name]].append(name)
        return {name: tensor for file in sorted(by_file) for name, tensor in self._read_from(file, by_file[file])}

    def fingerprint(self) -> str:
        """A digest that tells these weights from others, wherever they lie.

        Of every file: its header, and samples of its start, middle and end; so it is quick for any size, and training
        that changes a tensor in every layer changes it.

        Raises:
            ModelError: a file that is missing or damaged.
        """
        digest = hashlib.sha256()
        for file in sorted(set(self._file_of.values())):
            header, base, size = self._header(file)
            digest.update(json.dumps(header, sort_keys=True).encode())
            for begin in (base, (base + size) // 2, size - _SAMPLE):
                begin = max(base, begin)
                digest.update(self._bytes(file, begin, min(begin + _SAMPLE, size)))
        return digest.hexdigest()[:32]

    def _read_index(self) -> dict[str, str]:
        weights = self.location.weights
        if not weights.endswith(".json"):
            return dict.fromkeys(self._header(weights)[0], weights)
        try:
            text = self._fs.cat_file(f"{self._root}/{weights}")
        except _FAILURES as error:
            raise self._damaged(weights, f"cannot be read ({error})") from error
        self.bytes_read += len(text)
        try:
            return {str(name): str(file) for name, file in json.loads(text)["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(weights, "is not an index of safetensors files") from error

    def _header(self, file: str) -> tuple[dict[str, Any], int, int]:
        """The header of `file`, where its tensors' bytes begin, and its size."""
        if file in self._headers:
            return self._headers[file]
        try:
            size = self._fs.size(f"{self._root}/{file}")
        except _FAILURES as error:
            raise self._damaged(file, f"cannot be read ({error})") from error
        if size is None:
            raise self._damaged(file, "is served without its size, so its tensors cannot be read by range")
        if size < 8:
            raise self._damaged(file, f"is {size} bytes long")
        length = int.from_bytes(self._bytes(file, 0, 8), "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise self._damaged(file, f"claims a header of {length:,} bytes in a file of {size:,}")
        try:
            header = json.loads(bytes(self._bytes(file, 8, 8 + length)))
            header.pop("__metadata__", None)
        except (ValueError, AttributeError, TypeError) as error:
            raise self._damaged(file, "has a header that is not JSON") from error
        self._headers[file] = header, 8 + length, size
        return self._headers[file]

    def _read_from(self, file: str, names: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
        header, base, size = self._header(file)
        for name in names:
            try:
                entry = header[name]
                kind, shape = str(entry["dtype"]), [int(n) for n in entry["shape"]]
                begin, end = (int(offset) for offset in entry["data_offsets"])
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged(file, f"has no usable entry for '{name}'") from error
            if kind not in _DTYPES:
                raise ModelError(
                    f"The tensor '{name}' of {self.location.name} is stored as {kind}; longsift reads "
                    f"{', '.join(_DTYPES)}. Use the unquantised checkpoint."
                )
            dtype = _DTYPES[kind]
            if not 0 <= begin <= end <= size - base or end - begin != prod(shape) * dtype.itemsize:
                raise self._damaged(
                    file,
                    f"is {size:,} bytes long, and gives '{name}' {shape} the bytes {base + begin:,} to {base + end:,}",
                )
            data = self._bytes(file, base + begin, base + end)
            yield (
                name,
                (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape),
            )

    def _bytes(self, file: str, begin: int, end: int) -> bytearray:
        data = bytearray(end - begin)
        view = memoryview(data)
        try:
            # No read-ahead: exactly the range is asked for.
            with self._fs.open(f"{self._root}/{file}", "rb", cache_type="none") as handle:
                for at in range(begin, end, _PIECE):
                    stop = min(at + _PIECE, end)
                    handle.seek(at)
                    piece = handle.read(stop - at)
                    if len(piece) != stop - at:
                        raise self._damaged(file, f"ended after {at + len(piece):,} bytes")
                    view[at - begin : stop - begin] = piece
        except _FAILURES as error:
            raise self._damaged(file, f"cannot be read ({error})") from error
        self.bytes_read += len(data)
        return data

    def _damaged(self, file: str, what: str) -> ModelError:
        return ModelError(
            f"{self.location.folder}{'/' if self.location.is_remote else os.sep}{file} {what}. "
            "The checkpoint is incomplete or damaged: fetch it again."
        )
