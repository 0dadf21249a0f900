"""What docs/performance.md and the README say of speed is what the results files say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
KERNEL = {
    "layer": "longattn-8b",
    "measure": "far statistics",
    "length": 32768,
    "dtype": "bfloat16",
    "ms": 8.25,
    "low_ms": 8.0,
    "high_ms": 8.5,
    "tflop_per_s": 533.0,
    "products_floor_ms": 5.5,
    "exponentials_floor_ms": 4.6,
}
PUBLISHED = {
    "batch": 1,
    "length": 32768,
    "low_ms": 2400.0,
    "high_ms": 2600.0,
    "mask_ms": 2000.0,
    "peak_bytes": 23 << 30,
}
IDS = {"length": 32768, "low_ms": 9.9, "high_ms": 10.2, "one_window_ms": 11.0}
LONG = {"case": "LongAttn, Llama-3.1-8B", "name": "longattn-8b", "high_seconds": 9.0}
RUN = {
    "machine": {
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpus": 1,
        "torch": "2.11.0",
        "triton": "3.6.0",
        "transformers": "5.17.0",
        "driver": "580",
        "cores": 16,
        "when": "2026-11-22T12:00:00+00:00",
    },
    "command": "python benchmarks/gpu.py",
    "attention_kernels": {
        "rates": {"torch.bfloat16": 8e14, "exponentials": 3.7e12},
        "kernels": [KERNEL],
        "published": [{"case": "LongAttn, Llama-3.1-8B", "ms": 2500.0, **PUBLISHED}],
    },
    "throughput": {
        "ids": [
            {"case": "LongAttn, Llama-3.1-8B", "name": "longattn-8b", "ms": 10.0, "tokens_per_s": 3.2768e6, **IDS},
            {"case": "LADM, dense", "name": "ladm-dense", "ms": 400.0, "tokens_per_s": 81920.0, **IDS},
        ]
    },
    "long_windows": {
        "windows": [
            {"length": 1 << 15, "seconds": 0.01, "peak_bytes": 3 << 30, **LONG},
            {"length": 1 << 20, "seconds": 8.75, "peak_bytes": 14 << 30, **LONG},
        ]
    },
}


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_performance", ROOT / "docs" / "make_performance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_and_the_curve_are_those_of_the_results(pages):
    known = pages.runs()
    for page, text in ((pages.PAGE, pages.performance(known)), (pages.README, pages.summary(known))):
        shown = page.read_text("utf-8")
        assert pages.write(shown, text) == shown, "run: python docs/make_performance.py"
    drawn = pages.picture(known)
    assert (pages.CURVE.read_text("utf-8") if pages.CURVE.exists() else None) == drawn


def test_the_readme_compares_a_window_with_the_published_way(pages):
    text = pages.summary({"h100": RUN})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[2] == ["LongAttn, Llama-3.1-8B", "2,500", "10.0", "250×", "3,276,800"]
    assert cells[3] == ["LADM, dense", "–", "400", "–", "81,920"]
    assert "A window of 1,048,576 tokens takes 8.8 s and 14.0 GiB." in text


def test_the_page_has_every_table_of_a_run_and_its_targets(pages):
    text = pages.performance({"h100": RUN})
    assert "## NVIDIA H100 80GB HBM3" in text
    assert "(../benchmarks/results/h100.json)" in text
    assert "800 T/s bfloat16, 3.7 T/s exponentials" in text
    for title in ("Targets", "Statistics of one layer", "The published way", "Ids to scores", "Long windows"):
        assert f"### {title}\n" in text
    row = next(line for line in text.splitlines() if line.startswith("| LongAttn statistics, 8B layer"))
    assert "8.25" in row
    assert row.rstrip(" |").endswith("yes")


def test_a_run_on_a_cpu_is_not_shown(pages, tmp_path, monkeypatch):
    (tmp_path / "cpu.json").write_text('{"machine": {"cpu": "x"}}')
    (tmp_path / "old.json").write_text('{"tables": {}}')
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert pages.runs() == {}
    assert "No run of a GPU machine" in pages.performance({})
    assert pages.summary({}) == ""


def test_a_page_without_the_place_for_tables_is_refused(pages):
    with pytest.raises(ValueError, match="lacks the line"):
        pages.write("# A page\n", "tables")
