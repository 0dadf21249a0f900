"""Cutting that is stopped inside a source goes on there, and the tables are those of a cutting that was not."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longsift.cutting import begin_windows, can_be_cut_elsewhere, cut_sources
from longsift.engines.pieces import cut_pieces
from longsift.errors import InputError
from longsift.options import ModelOptions, WindowOptions
from longsift.progress import Progress
from longsift.shards import RunFolder, plan_pieces
from longsift.sources import Source, find_sources
from longsift.status import run_status
from longsift.tables import parquet_files

QUIET = Progress("windows", 1, "bytes", quiet=True)
WORDS = ["river", "stone", "of", "the", "light", "and", "seven", "under", "letters", "\n", "count", "again", "."]


def rows() -> list[dict]:
    """Documents from too short to many windows, rows of ids among them."""
    draw = random.Random(5)
    documents: list[dict] = []
    for number in range(40):
        if number % 9 == 4:
            documents.append({"id": f"ids-{number}", "input_ids": [draw.randrange(5, 900) for _ in range(70)]})
        else:
            text = " ".join(draw.choices(WORDS, k=draw.choice((20, 90, 300, 900))))
            documents.append({"id": f"text-{number}", "text": text})
    return documents


def write(folder: Path, kind: str) -> list[str]:
    """Two sources of the documents; JSON lines have bad rows among them."""
    folder.mkdir()
    for half, some in enumerate((rows()[:30], rows()[30:])):
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(some), folder / f"{half}.parquet", row_group_size=7)
            continue
        lines = [json.dumps(row) for row in some]
        for at in (3, 11, 12):
            lines[at:at] = ["{broken" if at % 2 else ""]
        text = "\n".join(lines).encode()
        if kind == "gz":
            (folder / f"{half}.jsonl.gz").write_bytes(gzip.compress(text))
        else:
            (folder / f"{half}.jsonl").write_bytes(text)
    return [str(folder)]


class Stopped(Exception):
    """The process ends here."""


def cut(inputs: list[str], out: Path, options: WindowOptions, parts: int | None = None) -> int:
    """Cut, and stop when `parts` parts were written or offered; how many were."""
    offered: list[Path] = []

    def count(path: Path) -> None:
        offered.append(path)
        if len(offered) == parts:
            raise Stopped

    folder = RunFolder(out)
    with folder.lock():
        cut_sources(find_sources(inputs), folder, ModelOptions(), options, overwrite=False, quiet=True, on_part=count)
    return len(offered)


def contents(out: Path) -> dict[str, bytes]:
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name in ("windows", "quarantine")
        for path in parquet_files(out / name)
    }


@pytest.mark.parametrize(
    ("kind", "more", "every"),
    [
        pytest.param("jsonl", {}, 1, id="JSON lines"),
        pytest.param("gz", {}, 2, id="gzip"),
        pytest.param("parquet", {}, 2, id="Parquet"),
        pytest.param("jsonl", {"cut_workers": 2}, 4, id="two processes"),
        pytest.param("parquet", {"limit": 33}, 2, id="limited"),
        pytest.param("gz", {"sample": 20, "seed": 3}, 1, id="sampled"),
        pytest.param("jsonl", {"piece_bytes": 5000}, 2, id="pieces of lines"),
        pytest.param(
            "parquet", {"piece_bytes": 1500, "cut_workers": 2}, 6, id="pieces of row groups, each process its own"
        ),
    ],
)
def test_cutting_that_is_stopped_after_its_parts_gives_the_same_tables(tmp_path, kind, more, every):
    inputs = write(tmp_path / "in", kind)
    options = WindowOptions(window=64, shard_tokens=256, **({"cut_workers": 1} | more))
    parts = cut(inputs, tmp_path / "quiet", options)
    assert parts > 6
    for part in range(1, parts + 1, every):  # each goes on with what those before it left
        with pytest.raises(Stopped):
            cut(inputs, tmp_path / "out", options, parts=part)
    # A sample that is begun anew keeps more at first than it keeps in the end.
    assert cut(inputs, tmp_path / "out", options) == parts or options.sample
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet")
    quiet, stopped = (RunFolder(tmp_path / name).section("windows") for name in ("quiet", "out"))
    assert stopped["counts"] == quiet["counts"]
    assert (stopped["tokenizer"], stopped["length"]) == (quiet["tokenizer"], 64)
    assert not (tmp_path / "out" / "shards" / "begun").exists()


def test_parts_before_the_stop_are_left_as_they_are_and_status_counts_them(tmp_path):
    inputs = write(tmp_path / "in", "jsonl")
    options = WindowOptions(window=64, shard_tokens=256, cut_workers=1)
    with pytest.raises(Stopped):
        cut(inputs, tmp_path / "out", options, parts=5)
    before = {path: path.stat().st_mtime_ns for path in parquet_files(tmp_path / "out" / "windows")}
    assert len(before) == 5
    marked = sum(pq.read_metadata(path).num_rows for path in sorted(before)[:4])  # it ended before it marked the last
    state = run_status(tmp_path / "out")["windows"]
    assert (state["pieces done"], state["pieces"], state["windows"]) == (0, 2, marked)
    with pytest.raises(Stopped):
        cut(inputs, tmp_path / "out", options, parts=6)
    after = {path: path.stat().st_mtime_ns for path in parquet_files(tmp_path / "out" / "windows")}
    assert [path.name for path in before if after[path] != before[path]] == ["00000-00000-00004.parquet"]


def table(out: Path, name: str) -> list[dict]:
    return [row for path in parquet_files(out / name) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize(
    "workers", [1, 2, 5], ids=["here", "by processes, each its own pieces", "by processes together"]
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("more", [{}, {"limit": 33}, {"sample": 20, "seed": 3}], ids=["all", "limited", "sampled"])
def test_pieces_of_any_size_give_the_same_rows(tmp_path, kind, workers, more):
    inputs = write(tmp_path / "in", kind)
    for name, piece_bytes in (("whole", 1 << 28), ("pieces", 3000)):
        options = WindowOptions(window=64, shard_tokens=256, cut_workers=workers, piece_bytes=piece_bytes, **more)
        cut(inputs, tmp_path / name, options)
    for name in ("windows", "quarantine"):
        assert table(tmp_path / "pieces", name) == table(tmp_path / "whole", name)
    whole, pieces = (RunFolder(tmp_path / name).section("windows") for name in ("whole", "pieces"))
    assert pieces["counts"] == whole["counts"]
    assert len(RunFolder(tmp_path / "pieces").records("windows")) > 5


@pytest.mark.parametrize("more", [{}, {"sample": 20, "seed": 3}], ids=["all", "sampled"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pieces_that_are_cut_elsewhere_in_any_order_give_the_same_tables(tmp_path, kind, more):
    inputs = write(tmp_path / "in", kind)
    options = WindowOptions(window=64, shard_tokens=256, cut_workers=1, piece_bytes=3000, **more)
    cut(inputs, tmp_path / "here", options)
    sources, folder = find_sources(inputs), RunFolder(tmp_path / "out")
    pieces = plan_pieces(sources, options.piece_bytes)

    with folder.lock():
        begin_windows(sources, folder, ModelOptions(), options, overwrite=False)
        shards = random.Random(1).sample(list(pieces), len(pieces))
        for share in (shards[::3], shards[::3], shards[1::3]):  # one is done twice, one is left
            some = {shard: pieces[shard] for shard in share}
            assert cut_pieces(some, folder, ModelOptions(), options, QUIET) == []
        cut_sources(sources, folder, ModelOptions(), options, overwrite=False, quiet=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "here")
    here, out = (RunFolder(tmp_path / name).section("windows")["counts"] for name in ("here", "out"))
    if "sample" in more:
        assert out.pop("windows_before_sample") == here.pop("windows_before_sample")
    assert out == here


def test_two_at_one_piece_do_no_harm(tmp_path):
    inputs = write(tmp_path / "in", "jsonl")
    options = WindowOptions(window=64, shard_tokens=256, cut_workers=1)
    cut(inputs, tmp_path / "quiet", options)
    sources, folder = find_sources(inputs), RunFolder(tmp_path / "out")
    pieces = plan_pieces(sources, options.piece_bytes)
    written: list[Path] = []

    def beside(path: Path) -> None:
        written.append(path)
        if len(written) == 3:  # another begins where this one has written and not yet said so, and overtakes it
            assert cut_pieces(pieces, folder, ModelOptions(), options, QUIET) == []

    with folder.lock():
        begin_windows(sources, folder, ModelOptions(), options, overwrite=False)
        assert cut_pieces(pieces, folder, ModelOptions(), options, QUIET, beside) == []
        cut_sources(sources, folder, ModelOptions(), options, overwrite=False, quiet=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet")
    counts = (RunFolder(tmp_path / name).section("windows")["counts"] for name in ("quiet", "out"))
    assert next(counts) == next(counts)


@pytest.mark.parametrize(
    ("workers", "piece_bytes"),
    [(1, 1 << 28), (2, 1 << 28), (2, 3000)],
    ids=["here", "by processes together", "by processes, each its own pieces"],
)
def test_a_file_that_is_gone_when_a_stopped_cutting_goes_on_is_not_taken_for_read(tmp_path, workers, piece_bytes):
    inputs = write(tmp_path / "in", "jsonl")
    options = WindowOptions(window=64, shard_tokens=256, cut_workers=workers, piece_bytes=piece_bytes)
    cut(inputs, tmp_path / "quiet", options)
    with pytest.raises(Stopped):
        cut(inputs, tmp_path / "out", options, parts=6)
    sources, folder = find_sources(inputs), RunFolder(tmp_path / "out")
    begun = {folder.pieces()[shard].source.url for shard in folder.places()}
    assert begun
    for url in begun:
        Path(url).rename(f"{url}.away")
    with folder.lock(), pytest.raises(InputError, match="could not be read"):
        cut_sources(sources, folder, ModelOptions(), options, overwrite=False, quiet=True)
    assert not folder.records("windows").keys() & folder.places().keys()
    assert folder.places()
    for url in begun:
        Path(f"{url}.away").rename(url)
    cut(inputs, tmp_path / "out", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet")


SECRET = "https://user:password@host/a.jsonl"


@pytest.mark.parametrize(
    ("address", "limit", "elsewhere"),
    [("", None, True), ("", 5, False), (SECRET, None, False)],
    ids=["a file", "a limit", "a password"],
)
def test_what_would_have_to_wait_or_to_write_a_secret_down_is_not_cut_elsewhere(address, limit, elsewhere):
    source = Source("https://host/a.jsonl", "a", "jsonl", 10, address=address)
    assert can_be_cut_elsewhere([source], WindowOptions(limit=limit)) == elsewhere


def test_overwriting_forgets_where_an_earlier_cutting_stopped(tmp_path):
    inputs = write(tmp_path / "in", "jsonl")
    with pytest.raises(Stopped):
        cut(inputs, tmp_path / "out", WindowOptions(window=64, shard_tokens=256, cut_workers=1), parts=5)
    other = WindowOptions(window=96, shard_tokens=512, cut_workers=1)
    folder = RunFolder(tmp_path / "out")
    with folder.lock():
        cut_sources(find_sources(inputs), folder, ModelOptions(), other, overwrite=True, quiet=True)
    cut(inputs, tmp_path / "quiet", other)
    assert contents(tmp_path / "out") == contents(tmp_path / "quiet")
