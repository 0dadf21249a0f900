from __future__ import annotations

import http.server
import json
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import make_checkpoint
from longsift.calculators.checkpoint import Checkpoint, Location, locate
from longsift.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one folder as the files of a hub model and as plain files, and counts the bytes of ranges."""

    folder: Path
    served: int

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.folder.iterdir())
        if "/api/models/absent/" in path:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif re.fullmatch(r"/api/models/org/model(/revision/[\w.]+)?", path):
            siblings = [{"rfilename": name} for name in names]
            self._send_json({"id": "org/model", "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/api/models/org/model/tree/"):
            self._send_json([self._entry(name) for name in names])
        elif (file := self.folder / path.rpartition("/")[2]).is_file():
            self._send_file(file)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = [file.name for file in self.folder.iterdir() if file.name in asked]
        self._send_json([self._entry(name) for name in names])

    def _entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0" * 40}

    def _send_file(self, file: Path) -> None:
        data, status, headers = file.read_bytes(), 200, {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if self.command == "GET" and file.suffix == ".safetensors":
            type(self).served += len(data)
        self._send(status, data, headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, type[Hub]]]:
    hub = type("ThisHub", (Hub,), {"folder": folder, "served": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama", layers=2)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with nothing in it, and no hub to reach."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def cached(cache: Path, repo: str) -> Path:
    """The folder in which a hub cache keeps the files of `repo`, with its main branch at COMMIT."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def test_tensors_are_those_of_the_safetensors_library(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    read = Checkpoint(locate(str(folder))).read(expected)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_floats_of_every_width_are_read_as_stored(dtype: torch.dtype, folder: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5, dtype=dtype),
        "none": torch.empty(0, 3, dtype=dtype),
        "some": torch.randn(3, 5).to(dtype),
    }
    save_file(tensors, folder / "model.safetensors")
    read = Checkpoint(locate(str(folder))).read(tensors)
    assert all(torch.equal(read[n], tensors[n]) and read[n].dtype == dtype for n in tensors)


def test_integers_are_refused_as_quantised(folder: Path) -> None:
    save_file({"packed": torch.zeros(4, dtype=torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"'packed' .* stored as U8.*unquantised"):
        Checkpoint(locate(str(folder))).read(["packed"])


def test_a_file_named_by_itself_is_found_with_its_configuration(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    location = locate(str(folder / "other.safetensors"))
    assert (location.folder, location.weights) == (str(folder), "other.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json beside it"):
        locate(str(folder / "other.safetensors"))


def without_weights(folder: Path, *others: str) -> None:
    (folder / "model.safetensors").unlink()
    for other in others:
        (folder / other).write_bytes(b"")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["pytorch_model.bin"], r"weights in pytorch_model\.bin; .* safetensors only.*save_pretrained"),
        (["consolidated.00.pth"], r"safetensors only"),
        (["model-q4.gguf"], r"is GGUF \(model-q4\.gguf\)"),
        ([], r"holds no weights: looked for model\.safetensors\.index\.json"),
    ],
    ids=["pickle", "pickle of the first Llama", "GGUF", "nothing"],
)
def test_a_folder_without_safetensors_is_refused(others: list[str], message: str, folder: Path) -> None:
    without_weights(folder, *others)
    with pytest.raises(ModelError, match=message):
        locate(str(folder))


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "nowhere", "a/b/c", "org--x/model", "model.bin"])
def test_a_name_of_nothing_is_refused(name: str, empty_cache: Path) -> None:
    with pytest.raises(ModelError, match=f"no model '{re.escape(name)}'"):
        locate(name)


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"is GGUF \(model\.gguf\).*safetensors only"):
        locate(str(tmp_path / "model.gguf"))


def with_header(folder: Path, header: bytes, length: int | None = None, data: bytes = b"\0" * 16) -> None:
    count = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", count) + header + data)


def entry(**changes: Any) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}).encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"\0\0"), r"is 2 bytes long"),
        (lambda f: with_header(f, b"{}", length=10**12), r"claims a header of 1,000,000,000,000 bytes"),
        (lambda f: with_header(f, b"{oops"), r"header that is not JSON"),
        (lambda f: with_header(f, b"[1, 2]"), r"header that is not JSON"),
        (lambda f: with_header(f, entry(data_offsets=[8, 24])), r"is \d+ bytes long, and gives 'w'"),
        (lambda f: with_header(f, entry(data_offsets=[-16, 0])), r"gives 'w'"),
        (lambda f: with_header(f, entry(shape=[5])), r"gives 'w' \[5\]"),
        (lambda f: with_header(f, entry(shape=None)), r"no usable entry for 'w'"),
        (lambda f: with_header(f, entry(), data=b"\0" * 15), r"gives 'w'"),
    ],
    ids=[
        "two bytes",
        "header longer than the file",
        "header cut short",
        "header of another kind",
        "offsets after the end",
        "offsets before the start",
        "another shape than the bytes",
        "no shape",
        "file cut short",
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[Path], Any], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=rf"model\.safetensors .*{message}.*fetch it again"):
        Checkpoint(locate(str(folder))).read(["w"])


def test_a_missing_shard_and_a_damaged_index_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", "llama", sharded=True)
    index = folder / "model.safetensors.index.json"
    name, file = next(iter(json.loads(index.read_text())["weight_map"].items()))
    (folder / file).unlink()
    with pytest.raises(ModelError, match=f"{re.escape(file)} cannot be read"):
        Checkpoint(locate(str(folder))).read([name])
    index.write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match="is not an index"):
        Checkpoint(locate(str(folder)))


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no tensor 'model.other'"):
        Checkpoint(locate(str(folder))).read(["model.other"])


def test_over_http_only_the_ranges_of_the_named_tensors_are_fetched(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", "llama", sharded=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    expected = load_file(folder / file)[name]
    with served(folder) as (url, hub):
        checkpoint = Checkpoint(Location("remote", url, url, None, "model.safetensors.index.json"))
        index_bytes = checkpoint.bytes_read
        assert torch.equal(checkpoint.read([name])[name], expected)
        header = struct.unpack("<Q", (folder / file).read_bytes()[:8])[0]
        assert hub.served == checkpoint.bytes_read - index_bytes == 8 + header + expected.nbytes


def test_a_hub_model_in_the_cache_is_taken_from_there(empty_cache: Path) -> None:
    snapshot = cached(empty_cache, "org/model")
    make_checkpoint(snapshot, "llama", layers=1)
    for name, revision in (("org/model", None), ("org/model@main", None), ("org/model", COMMIT)):
        location = locate(name, revision)
        assert (location.folder, location.revision) == (str(snapshot), COMMIT)
    with pytest.raises(ModelError, match="give one of them"):
        locate("org/model@main", "other")


def test_without_a_network_a_model_that_is_not_cached_as_a_whole_says_what_to_do(empty_cache: Path) -> None:
    snapshot = cached(empty_cache, "org/model")
    make_checkpoint(snapshot, "llama", sharded=True)
    next(snapshot.glob("*.safetensors")).unlink()
    for name in ("org/model", "org/other"):
        with pytest.raises(ModelError, match=r"hub cannot be reached .*`hf download org/\w+`"):
            locate(name)


REMOTE = """
import json
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.errors import ModelError
import torch
ids = torch.arange(100)[None]
first = FirstLayer.load("org/model@v1")
print(json.dumps(first.describe()))
full = FullModel.load("org/model")
print(torch.allclose(full.reduce(ids, lambda attention: attention.q)[0], first.queries_keys(ids).q, atol=1e-4))
try:
    FirstLayer.load("absent/model")
except ModelError as error:
    print(error)
"""


def test_a_hub_model_is_read_by_range_for_its_first_layer_and_fetched_for_the_whole(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", "qwen3", sharded=True)
    local = Checkpoint(locate(str(folder)))
    with served(folder) as (url, hub):
        hidden = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-c", REMOTE],
            env={**hidden, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    description, same, error = done.stdout.splitlines()
    described = json.loads(description)
    assert (described["model"], described["revision"]) == ("org/model@v1", COMMIT)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert local.bytes_read < described["bytes_read"] < 0.5 * whole
    assert hub.served == described["bytes_read"] - local.bytes_read + whole
    assert same == "True"
    assert re.match(r"There is no model 'absent/model': no folder of that name here, and no public model", error)
