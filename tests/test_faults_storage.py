"""What a storage does wrong: it refuses, loses, cuts short or changes a file; over S3 and HTTP, and on a disk.

Damage inside a file is a bad row, after all rows before it; whatever the storage does wrong is an error that names the
file, so that it is read again and never taken for whole.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from longsift.documents import BadRow, Document, ReadOptions, find_sources, read_documents
from longsift.errors import InputError

Rows = list[Document | BadRow]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": lambda data: data,
    "jsonl.gz": gzip.compress,
    "jsonl.zst": zstandard.compress,
}


def read(url: object) -> Rows:
    return [row for source in find_sources([str(url)]) for row in read_documents(source, ReadOptions())]


def texts(rows: Rows) -> list[str | None]:
    return [row.text for row in rows if isinstance(row, Document)]


def bad(rows: Rows) -> list[tuple[str, int | None, str]]:
    return [(row.file, row.row, row.reason) for row in rows if isinstance(row, BadRow)]


def lines(*rows: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows)


def packed(ending: str, rows: list[str], folder: Path) -> bytes:
    if ending != "parquet":
        return PACK[ending](lines(*rows))
    pq.write_table(pa.table({"text": rows}), folder / "packed.parquet")
    return (folder / "packed.parquet").read_bytes()


# --- S3 ---


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A real HTTP server that speaks S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket of a server that lets everyone in."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    tell_server("reset-auth", b"1000000")
    tell_server("reset", b"")
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir("corpus")
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()


def tell_server(what: str, data: bytes) -> None:
    url, headers = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/{what}", {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, data, headers, method="POST")
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


def refuse_everyone() -> None:
    """From here on the server wants to know who asks, and it knows no one."""
    tell_server("reset-auth", b"0")


def test_documents_are_read_from_s3(bucket: Any, tmp_path: Path) -> None:
    bucket.pipe("corpus/en/a.jsonl.zst", zstandard.compress(lines("a", "b")))
    bucket.pipe("corpus/_tmp/x.jsonl", b"{}\n")
    bucket.pipe("corpus/de/b.parquet", packed("parquet", ["c", "d"], tmp_path))
    for given_input in ("s3://corpus/*/*", "s3://corpus", "s3://corpus/"):
        rows = read(given_input)
        assert texts(rows) == ["c", "d", "a", "b"]
        assert [row.doc_id for row in rows if isinstance(row, Document)] == ["de/b:0", "de/b:1", "en/a:0", "en/a:1"]
        assert rows[-1].file == "s3://corpus/en/a.jsonl.zst"
    with pytest.raises(InputError, match="s3://corpus/none"):
        read("s3://corpus/none.jsonl")


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("jsonl.gz", "truncated gzip stream"),
        ("jsonl.zst", "truncated zstd stream"),
        ("parquet", "unreadable parquet file"),
    ],
)
def test_a_truncated_object_is_a_bad_row_and_the_other_objects_are_read(
    bucket: Any, tmp_path: Path, ending: str, reason: str
) -> None:
    data = packed(ending, ["a", "b"], tmp_path)
    bucket.pipe(f"corpus/1.{ending}", data[: len(data) * 9 // 10])
    bucket.pipe(f"corpus/2.{ending}", data)
    rows = read("s3://corpus")
    [(file, row, found)] = bad(rows)
    assert (file, found) == (f"s3://corpus/1.{ending}", reason)
    assert (row is None) == (ending == "parquet")
    assert texts(rows)[-2:] == ["a", "b"]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst", "parquet"])
def test_an_object_that_is_deleted_after_the_listing_is_an_error_that_names_it(
    bucket: Any, tmp_path: Path, ending: str
) -> None:
    bucket.pipe(f"corpus/a.{ending}", packed(ending, ["a"], tmp_path))
    [source] = find_sources(["s3://corpus"])
    bucket.rm(f"corpus/a.{ending}")
    with pytest.raises(InputError, match=rf"s3://corpus/a\.{ending}"):
        list(read_documents(source, ReadOptions()))


@pytest.mark.parametrize("change", ["longer", "shorter"])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_an_object_that_is_written_anew_while_it_is_read_is_an_error_that_names_it(
    bucket: Any, tmp_path: Path, ending: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "default_block_size", 1 << 16)  # otherwise 50 MiB come at once
    rows = [base64.b64encode(os.urandom(3 << 14)).decode() for _ in range(80)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=1, use_dictionary=False)
    data = (tmp_path / "a.parquet").read_bytes() if ending == "parquet" else PACK[ending](lines(*rows))
    bucket.pipe(f"corpus/a.{ending}", data)
    [source] = find_sources(["s3://corpus"])
    reading = read_documents(source, ReadOptions())
    next(reading)
    fsspec.filesystem("s3", skip_instance_cache=True).pipe(
        f"corpus/a.{ending}", data + data if change == "longer" else data[: len(data) // 2]
    )
    with pytest.raises(InputError, match=rf"s3://corpus/a\.{ending}"):
        list(reading)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_an_object_that_may_not_be_read_is_an_error_that_names_it(bucket: Any, tmp_path: Path, ending: str) -> None:
    bucket.pipe(f"corpus/a.{ending}", packed(ending, ["a"], tmp_path))
    [source] = find_sources(["s3://corpus"])
    refuse_everyone()
    with pytest.raises(InputError, match=rf"s3://corpus/a\.{ending}.*(PermissionError|Forbidden)"):
        list(read_documents(source, ReadOptions()))


def test_a_bucket_that_may_not_be_listed_is_an_error_that_names_it(bucket: Any) -> None:
    bucket.pipe("corpus/a.jsonl", lines("a"))
    refuse_everyone()
    bucket.invalidate_cache()
    with pytest.raises(InputError, match=r"cannot list 's3://corpus'.*PermissionError"):
        find_sources(["s3://corpus"])


# --- a disk ---


@pytest.fixture
def no_rights() -> Iterator[None]:
    """The rights of a user who owns nothing here, since root may read every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_that_may_not_be_read_is_an_error_that_names_it(
    tmp_path: Path, ending: str, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(packed(ending, ["a"], tmp_path))
    path.chmod(0)
    [source] = find_sources([str(path)])
    request.getfixturevalue("no_rights")
    with pytest.raises(InputError, match=rf"cannot open .*a\.{ending}: PermissionError"):
        list(read_documents(source, ReadOptions()))


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
def test_a_file_of_another_size_than_was_found_is_an_error_that_names_it(
    tmp_path: Path, ending: str, change: int
) -> None:
    path = tmp_path / f"a.{ending}"
    whole = PACK[ending](lines("a", "b", "c"))
    path.write_bytes(whole)
    [source] = find_sources([str(path)])
    path.write_bytes(whole[:-20] if change < 0 else whole + PACK[ending](lines("d")))
    with pytest.raises(InputError, match=rf"a\.{ending} changed: it had {len(whole)} bytes"):
        list(read_documents(source, ReadOptions()))


# --- HTTP, with a password or a signature in the address ---

SECRETS = ("s3cr3t-pass", "s1gnature")


class Files(BaseHTTPRequestHandler):
    """Gives a file to those who have the password, or the signature."""

    data = lines("a", "b")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        login = base64.b64encode(f"reader:{SECRETS[0]}".encode()).decode()
        if query != f"sig={SECRETS[1]}" and self.headers["Authorization"] != f"Basic {login}":
            self.answer(403, b"")
        elif path != "/data/a.jsonl":
            self.answer(404, b"")
        elif "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self.answer(206, self.data[int(first) : int(last) + 1])
        else:
            self.answer(200, self.data)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "address", ["http://reader:s3cr3t-pass@{host}/data/{file}", "http://{host}/data/{file}?sig=s1gnature"]
)
def test_secrets_in_an_address_open_the_file_and_show_nowhere(host: str, address: str) -> None:
    [source] = find_sources([address.format(host=host, file="a.jsonl")])
    rows = list(read_documents(source, ReadOptions()))
    assert texts(rows) == ["a", "b"]
    assert {row.file for row in rows} == {source.url} == {f"http://{host}/data/a.jsonl"}
    assert source.name == "a"
    errors: list[BaseException | None] = []
    with pytest.raises(InputError, match=r"none\.jsonl' does not exist") as gone:
        find_sources([address.format(host=host, file="none.jsonl")])
    errors.append(gone.value)
    Files.data, before = b"", Files.data
    try:
        with pytest.raises(InputError) as changed:
            list(read_documents(source, ReadOptions()))
    finally:
        Files.data = before
    errors.append(changed.value)
    shown = repr(source) + repr(rows) + "".join(map(repr, [*errors, *(error.__cause__ for error in errors if error)]))
    assert not any(secret in shown for secret in SECRETS)


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAUSER:s3cr3t-pass@corpus/a.jsonl",
        "s3://AKIAUSER:s3cr3t-pass/with+slash@corpus/a.jsonl",
        "http://reader:s3cr3t-pass@127.0.0.1:9/a.jsonl",
        "http://s3cr3t-pass@127.0.0.1:9/a.jsonl",
        "https://127.0.0.1:9/a.jsonl?X-Amz-Signature=s3cr3t-pass&X-Amz-Credential=s3cr3t-pass%2F1",
        "gopher://reader:s3cr3t-pass@hole/a.jsonl",
    ],
)
@pytest.mark.usefixtures("bucket")
def test_an_error_does_not_show_the_secrets_of_an_address(address: str) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl") as error:
        find_sources([address])
    assert "s3cr3t" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


@pytest.mark.parametrize(
    "address", ["hf://datasets/org/name@v1/a.jsonl", "memory://corpus/a@b.jsonl", "abfs://box@account/a.jsonl"]
)
def test_an_address_without_secrets_is_shown_as_it_is(address: str) -> None:
    from longsift.sources import _public

    assert _public(address) == address
