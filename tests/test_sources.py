"""Which files an input names, and what they are called."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from datasets import Dataset, DatasetDict
from fsspec.registry import _registry

from longsift.documents import ReadOptions, read_documents
from longsift.errors import InputError
from longsift.sources import find_sources


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def found(*inputs: object) -> list[str]:
    return [source.name for source in find_sources([str(given) for given in inputs])]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.json", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("A.JSONL.GZ", "jsonl.gz"),
        ("a.json.zst", "jsonl.zst"),
        ("a.ndjson.zstd", "jsonl.zst"),
        ("a.parquet", "parquet"),
        ("a.arrow", "arrow"),
    ],
)
def test_the_ending_tells_the_format(tmp_path: Path, name: str, kind: str) -> None:
    touch(tmp_path / name)
    [source] = find_sources([str(tmp_path / name)])
    assert (source.url, source.name.lower(), source.format, source.size) == (
        str(tmp_path / name),
        "a",
        kind,
        3,
    )


def test_a_folder_is_searched_to_its_depth_in_the_order_of_paths(tmp_path: Path) -> None:
    touch(tmp_path / "b.jsonl", tmp_path / "a" / "deep" / "z.parquet", tmp_path / "a" / "y.json.gz")
    assert found(tmp_path) == ["a/deep/z", "a/y", "b"]


def test_hidden_private_and_foreign_files_in_a_folder_are_left_out(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("_SUCCESS.json", ".hidden.jsonl", "README.md", "_tmp/a.jsonl", "b.jsonl")))
    assert found(tmp_path) == ["b"]
    assert found(tmp_path / "**") == ["b"]


def test_a_file_named_outright_is_read_even_when_hidden(tmp_path: Path) -> None:
    touch(tmp_path / ".hidden.jsonl")
    assert found(tmp_path / ".hidden.jsonl") == [".hidden"]


def test_a_folder_inside_a_hidden_folder_can_be_read(tmp_path: Path) -> None:
    touch(tmp_path / ".cache" / "data" / "a.jsonl")
    assert found(tmp_path / ".cache" / "data") == ["a"]
    assert found(tmp_path / ".cache" / "*" / "*.jsonl") == ["a"]


def test_a_glob_names_files_and_folders(tmp_path: Path) -> None:
    touch(
        tmp_path / "x1" / "a.jsonl",
        tmp_path / "x2" / "b.jsonl",
        tmp_path / "y" / "c.jsonl",
        tmp_path / "x.txt",
    )
    assert found(tmp_path / "x*") == ["x1/a", "x2/b"]
    assert found(tmp_path / "*" / "[ac].jsonl") == ["x1/a", "y/c"]


def test_a_path_with_brackets_that_exists_is_no_glob(tmp_path: Path) -> None:
    touch(tmp_path / "run[1].jsonl", tmp_path / "run1.jsonl")
    assert found(tmp_path / "run[1].jsonl") == ["run[1]"]


def test_a_file_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert found("a.jsonl", tmp_path, "../" + tmp_path.name + "/*.jsonl") == ["a"]


def test_names_stay_unique_over_folders_and_endings(tmp_path: Path) -> None:
    touch(tmp_path / "en" / "part.jsonl", tmp_path / "de" / "part.jsonl")
    assert found(tmp_path) == ["de/part", "en/part"]
    touch(tmp_path / "de" / "part.parquet")
    assert found(tmp_path) == ["de/part.jsonl", "de/part.parquet", "en/part.jsonl"]


@pytest.mark.parametrize("given", ["missing.jsonl", "missing/", "missing-*.jsonl"])
def test_nothing_found_is_an_error_that_names_the_input(tmp_path: Path, given: str) -> None:
    with pytest.raises(InputError, match="missing"):
        find_sources([str(tmp_path / given)])


def test_an_unknown_ending_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    touch(tmp_path / "a.csv")
    for given in (tmp_path / "a.csv", tmp_path):
        with pytest.raises(InputError, match=r"\.jsonl.*\.zst.*\.parquet"):
            find_sources([str(given)])


def test_s3_without_s3fs_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # left by an earlier use of s3fs
    with pytest.raises(InputError, match=r"pip install 'longsift\[s3\]'"):
        find_sources(["s3://bucket/data.jsonl"])


def test_an_unknown_protocol_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gopher"):
        find_sources(["gopher://hole/data.jsonl"])


def test_a_saved_dataset_is_its_own_files_without_caches(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved", num_shards=2)
    touch(tmp_path / "saved" / "cache-0123456789abcdef.arrow")
    assert found(tmp_path / "saved") == ["data-00000-of-00002", "data-00001-of-00002"]


def test_a_saved_dataset_dict_is_all_its_splits(tmp_path: Path) -> None:
    split = Dataset.from_dict({"text": ["a"]})
    DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "saved")
    assert found(tmp_path / "saved") == ["test/data-00000-of-00001", "train/data-00000-of-00001"]
    assert found(tmp_path / "saved" / "train") == ["data-00000-of-00001"]


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/corpus", recursive=True)


def test_every_fsspec_file_system_is_listed_alike(memory: fsspec.AbstractFileSystem) -> None:
    for path in ("/corpus/data/b.jsonl", "/corpus/data/a.parquet", "/corpus/_x/c.jsonl", "/corpus/README.md"):
        memory.pipe(path, b"{}\n")
    urls = [source.url for source in find_sources(["memory://corpus"])]
    assert urls == ["memory:///corpus/data/a.parquet", "memory:///corpus/data/b.jsonl"]
    assert find_sources(["memory://corpus/data/*"]) == find_sources(["memory://corpus"])


HUB_FILES = {"data/a.jsonl": b'{"text": "a"}\n{"text": "b"}\n', "README.md": b"", "dataset_infos.json": b"{}\n"}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP API as reading the dataset org/name takes."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/org/name/tree/"):
            files = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in HUB_FILES.items()]
            folder = {"type": "directory", "path": "data", "size": 0, "oid": "0"}
            self.answer(json.dumps([folder, *files]).encode())
        elif path in ("/api/datasets/org/name", "/api/datasets/org/name/revision/v1"):
            self.answer(json.dumps({"id": "org/name", "sha": "0" * 40}).encode())
        elif path.startswith("/datasets/org/name/resolve/v1/"):
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self.answer(HUB_FILES[path.split("/", 6)[6]][int(first) : int(last) + 1], status=206)
        else:
            self.answer(b"{}", status=404)

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub on this machine."""
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{server.server_port}"})
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield
    huggingface_hub.HfFileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_a_dataset_on_the_hub_is_read_at_its_revision() -> None:
    [source] = find_sources(["hf://datasets/org/name@v1"])
    assert (source.url, source.name, source.size) == ("hf://datasets/org/name@v1/data/a.jsonl", "a", 28)
    assert [getattr(row, "text", row) for row in read_documents(source, ReadOptions())] == ["a", "b"]


@pytest.mark.usefixtures("hub")
def test_a_dataset_that_the_hub_does_not_know_is_an_error() -> None:
    with pytest.raises(InputError, match="hf://datasets/org/none"):
        find_sources(["hf://datasets/org/none"])
