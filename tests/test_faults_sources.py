"""A source that cannot be read does not stop the others, is not taken for read, and is read when it can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from longsift.cutting import cut_sources
from longsift.errors import InputError
from longsift.options import ModelOptions, WindowOptions
from longsift.shards import RunFolder
from longsift.sources import find_sources
from test_pipeline import contents, longsift


@pytest.mark.parametrize("workers", [1, 2], ids=["cut here", "cut by processes"])
@pytest.mark.parametrize("fault", ["gone", "cut short"])
def test_the_other_files_are_cut_and_the_run_goes_on_with_it_alone(corpus, model, tmp_path, fault, workers):
    inputs = tmp_path / "in"
    inputs.mkdir()
    first = inputs / "0.jsonl"
    first.write_bytes((corpus / "b.jsonl").read_bytes())
    for path in corpus.iterdir():
        (inputs / path.name).write_bytes(path.read_bytes())
    options = ModelOptions(model=str(model)), WindowOptions(window=512, shard_tokens=1024, cut_workers=workers)
    sources, folder = find_sources([str(inputs)]), RunFolder(tmp_path / "out")
    whole = first.read_bytes()
    first.unlink()
    if fault == "cut short":
        first.write_bytes(whole[:-2000])
    with folder.lock():
        with pytest.raises(InputError, match=r"1 of 3 files could not be read; all others were cut.*0\.jsonl"):
            cut_sources(sources, folder, *options, overwrite=False, quiet=True)
        assert list(folder.records("windows")) == ["00001-00000", "00002-00000"]
        assert folder.manifest()["windows"]["status"] == "running"
        before = {path: path.stat().st_mtime_ns for path in Path(folder.windows).glob("0000[12]-*")}
        first.write_bytes(whole)
        counts = cut_sources(sources, folder, *options, overwrite=False, quiet=True)
    assert counts["documents"] == 7 + 12
    assert {path: path.stat().st_mtime_ns for path in before} == before
    longsift(
        "windows", inputs, "-o", tmp_path / "undisturbed", "--model", model, "--window", 512, "--shard-tokens", 1024
    )
    assert contents(folder.windows) == contents(tmp_path / "undisturbed" / "windows")
