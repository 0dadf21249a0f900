"""A disk that is full: the run ends with the file and the reason, and goes on once there is room."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longsift.errors import OutputError
from longsift.shards import write_json
from longsift.tables import publish
from test_pipeline import contents, longsift

FLAGS = ["--method", "longattn", "--window", "512", "--shard-tokens", "4096", "--keep", "0.5", "-q"]


@contextmanager
def little_room(limit: int) -> Iterator[None]:
    """Every write beyond `limit` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def whole(corpus, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    longsift("run", corpus, "-o", out, "--model", model, *FLAGS)
    return out


@pytest.mark.parametrize(("stage", "limit"), [("windows", 4000), ("scores", 3000)])
def test_a_full_disk_ends_the_run_with_the_reason_and_the_run_goes_on_to_the_same_bytes(
    whole, corpus, model, tmp_path, stage, limit
):
    command = ["run", corpus, "-o", tmp_path, "--model", model, *FLAGS]
    if stage == "scores":
        longsift("windows", corpus, "-o", tmp_path, "--model", model, "--window", 512, "--shard-tokens", 4096, "-q")
    with little_room(limit):
        output = longsift(*command, code=1)
    assert f"error: Cannot write {tmp_path / stage}" in output
    assert "File too large. Once that is mended, the same command goes on where it stopped" in output
    for name in ("windows", "scores"):  # what is there is whole
        written = contents(tmp_path / name) if (tmp_path / name).exists() else {}
        assert written.items() <= contents(whole / name).items()
    assert not list(tmp_path.rglob(".*.tmp"))
    longsift("status", tmp_path)

    longsift(*command)
    for name in ("windows", "scores", "selected"):
        assert contents(tmp_path / name) == contents(whole / name)


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()

    def write() -> None:
        with publish(path) as temporary:
            temporary.write_text("half")
            Path("/dev/full").write_text("the other half")

    with pytest.raises(OutputError, match=r"Cannot write .*record\.json: .*No space left"):
        write()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
