"""The benchmarks run, and what they compare with is what they say it is."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType

import pytest
import torch

from longsift.attention import far_statistics, span_focus
from longsift.methods.ladm import Ladm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _programs_find_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def program(name: str) -> ModuleType:
    return importlib.import_module(name)


def figures(name: str, out: Path, *flags: object) -> dict:
    """Run a benchmark in this process; returns the figures that it writes."""
    program(name).main(["--quick", "--device", "cpu", "--out", str(out), *map(str, flags)])
    return json.loads(out.read_text("utf-8"))


def random_queries_keys(length: int, heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(1, n, length, 16, generator=generator) for n in (heads, kv_heads))
    return q, k


def test_the_published_longattn_looks_at_future_tokens_as_it_is_known_to():
    # Flat attention over all tokens: METHODS of the published code give 0.281 where the causal map has 0.403.
    q, k = (torch.zeros(1, 2, 1024, 8) for _ in range(2))
    _, (strength, _) = program("published").longattn_layer(q, k, torch.randn_like(k), 1.0)
    assert strength[0].tolist() == pytest.approx([0.281] * 2, abs=1e-3)


def test_the_published_longattn_is_the_far_sum_and_variance_of_the_map():
    (q, k), length = random_queries_keys(100), 100
    out, (strength, variance) = program("published").longattn_layer(q, k, k, 0.25)
    p = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.25).softmax(-1)
    position = torch.arange(length)
    far = p * (position[:, None] - position >= length - 3 * (length // 4))
    torch.testing.assert_close(strength[0], far[0].sum((1, 2)) / length)
    torch.testing.assert_close(variance[0], far[0].flatten(1).var(1))
    torch.testing.assert_close(out, p @ k.repeat_interleave(2, 1))


def test_the_published_ladm_gives_the_score_of_the_method():
    q, k = random_queries_keys(2600)
    ladm = Ladm()
    focus = span_focus(q.double(), k.double(), 128, query_spans=ladm.query_spans(2600), average_heads=True)
    expected = torch.as_tensor(ladm.contextual_dependency(focus[0], 2600))
    found = program("published").ladm_dependency(q, k.repeat_interleave(2, 1), 0.25)
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-5)


def test_the_exact_values_are_those_of_the_reference():
    (q, k), kernels = random_queries_keys(700), program("attention_kernels")
    exact = kernels.exact_far(q[0], k[0].repeat_interleave(2, 0), 175, 0.25)
    reference = far_statistics(q.double(), k.double(), 175, backend="reference")
    torch.testing.assert_close(exact[0], reference.strength[0])
    torch.testing.assert_close(exact[1], reference.variance[0], rtol=1e-9, atol=0)
    for denominator in ("prior", "causal"):
        spans = [1, 3, 4]
        found = kernels.exact_focus(q[0], k[0].repeat_interleave(2, 0), spans, denominator, 0.25)
        expected = span_focus(
            q.double(),
            k.double(),
            128,
            query_spans=spans,
            denominator=denominator,
            average_heads=True,
            backend="reference",
        )
        torch.testing.assert_close(found, expected[0])


@pytest.mark.parametrize(("length", "spans"), [(700, [1, 3, 4]), (256, [0, 1])])
@pytest.mark.parametrize("denominator", ["prior", "causal"])
def test_the_counted_pairs_are_those_of_the_softmaxes(length, spans, denominator):
    lead, pairs = length % 128, 0
    for j in spans:
        for row in range(lead + 128 * j, lead + 128 * (j + 1)):
            pairs += lead + 128 * j if denominator == "prior" else row + 1
    assert program("attention_kernels").visible_pairs(length, spans, denominator) == pairs


def test_the_kernels_benchmark_measures_and_finds_small_errors(tmp_path):
    result = figures("attention_kernels", tmp_path / "out.json", "--layer", "smollm2", "--length", 2432)
    assert {row["measure"] for row in result["kernels"]} >= {
        "far statistics",
        "span focus, dense, prior",
        "causal attention (PyTorch SDPA)",
        "published LADM statistics",
    }
    assert all(row["low_ms"] <= row["ms"] <= row["high_ms"] for row in result["kernels"])
    assert {row["batch"] for row in result["published"]} == {1, 4}
    assert {row["inputs"].split(",")[0] for row in result["errors"]} == {"random", "embedded"}
    for row in result["errors"]:
        assert row["errors"]["strength"] < 1e-5
        assert row["errors"]["variance"] < 1e-4
        assert max(row["errors"].values()) < 1e-4
    assert result["machine"]["torch"] == torch.__version__


def test_a_wrong_measure_has_a_large_error():
    (q, k), kernels = random_queries_keys(700), program("attention_kernels")
    strength, _ = kernels.exact_far(q[0], k[0].repeat_interleave(2, 0), 175, 0.25)
    wrong = far_statistics(q, k, 176, scale=0.25).strength[0]
    assert kernels._largest(wrong, strength) > 1e-3
    assert kernels._largest(torch.full_like(strength, math.nan), strength) == math.inf


def test_throughput_counts_tokens_of_ids_and_of_text(tmp_path):
    flags = ["--part", "ids", "--part", "text", "--part", "sampled", "--case", "longattn-8b", "--characters", 60_000]
    result = figures("throughput", tmp_path / "out.json", *flags, "--tmp", tmp_path)
    ids, text = result["ids"][0], result["text"][0]
    assert ids["tokens_per_s"] == pytest.approx(ids["length"] / ids["ms"] * 1e3)
    assert text["tokens"] == text["windows"] * text["length"] > 0
    assert text["failed"] == 0
    assert [row["model"] for row in result["sampled"]] == ["embedded"]
    assert all(-1 <= value <= 1 for row in result["sampled"] for value in row["spearman"].values())


def test_the_overhead_of_the_engine_is_of_the_same_windows(tmp_path):
    result = figures("engine_overhead", tmp_path / "out.json")
    assert result["windows"] == 12
    for key in ("seconds", "processor_seconds"):
        assert result["overhead"][key] == pytest.approx(result["stage"][key] / result["bare"][key] - 1)
        assert result["bare"][key] > 0


def test_cutting_is_timed_with_one_reader_and_with_many(tmp_path):
    result = figures("cutting", tmp_path / "out.json", "--workers", 1, 2, "--folder", tmp_path)
    assert [row["workers"] for row in result["rows"]] == [1, 2]
    assert len({row["tokens"] for row in result["rows"]}) == 1
    assert all(row[way] > 0 for row in result["rows"] for way in ("together", "apart"))


def test_long_windows_are_measured_up_to_the_time_that_they_may_take(tmp_path, capsys):
    curve = tmp_path / "curve.svg"
    flags = ["--case", "ladm-layer", "--lengths", 2560, 3072, 2560 << 12, "--curve", curve]
    result = figures("long_windows", tmp_path / "out.json", *flags)
    assert [row["length"] for row in result["windows"]] == [2560, 3072]
    assert "10,485,760 tokens left out" in capsys.readouterr().out
    picture = xml.etree.ElementTree.parse(curve)
    assert len(picture.findall(".//{*}circle")) == 2


def test_selections_are_timed_and_their_processes_weighed(tmp_path):
    result = figures("selection", tmp_path / "selection.json", "--rows", 3000, "--folder", tmp_path)
    assert (result["rows"], result["files"]) == (3000, 8)
    plain, apart, deduplicated = result["selections"]
    assert {run["kept"] for run in (plain, apart)} == {375}
    assert plain["passed_over"] == plain["duplicates"] == apart["duplicates"] == 0
    assert apart["passed_over"] > 0 < deduplicated["duplicates"]
    assert all(run["seconds"] > 0 and 0.05 < run["peak_memory_gb"] < 2 for run in result["selections"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["selection.json"]


def test_pages_comparisons_and_summaries_of_many_windows_are_timed(tmp_path):
    result = figures("view", tmp_path / "view.json", "--folder", tmp_path)
    assert set(result["seconds"]) == {"the groups at the end of scoring", "compare", "view: start"}
    assert len(result["pages"]) == 11
    assert all(0 < page["median_ms"] <= page["slowest_ms"] for page in result["pages"])
    assert [page["found"] for page in result["pages"] if page["page"].startswith("first pages")] == [3000, 3000]
    assert result["pages"][-1]["found"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["view.json"]


def test_a_report_is_timed_weighed_and_opened(tmp_path):
    result = figures("report", tmp_path / "out.json", "--rows", 2000, "--folder", tmp_path, "--page", tmp_path / "page")
    assert (result["rows"], result["files"], result["groups"]) == (2000, 4, 32)
    report = result["report"]
    assert report["seconds"] > 0
    assert 0.05 < report["peak_memory_gb"] < 2
    assert 1_000_000 < report["page_bytes"] == (tmp_path / "page").stat().st_size < 3_000_000
    if shutil.which("chromium"):
        assert 0 < report["first_paint_ms"] < report["drawn_ms"]


def test_the_page_of_a_window_is_timed_and_weighed(tmp_path):
    result = figures("inspecting", tmp_path / "out.json")["inspect"]
    assert (result["tokens"], result["passages"]) == (2048, 16)
    assert result["seconds"] > 0 < result["core_seconds"]
    assert 0.1 < result["peak_memory_gb"] < 4
    assert 500_000 < result["page_bytes"] < 3_000_000


def test_a_run_tells_which_targets_are_met_missed_and_not_measured():
    gpu = program("gpu")
    kernel = {"layer": "longattn-8b", "measure": "far statistics", "length": 32768, "dtype": "bfloat16"}
    results = {
        "attention_kernels": {
            "kernels": [{**kernel, "ms": 8.0}, {**kernel, "layer": "longattn-70b", "ms": 20.0}],
            "errors": [{"errors": {"strength": 1e-6, "CDS, dense, prior": 2e-6}}],
            "published": [{"case": "LongAttn, Llama-3.1-8B", "ms": 2500.0, "length": 32768}],
        },
        "throughput": {"ids": [{"name": "longattn-8b", "ms": 10.0, "length": 32768, "tokens_per_s": 3e6}]},
    }
    found = gpu.figures(results)
    assert found == {
        "longattn-8b statistics": 8.0,
        "longattn-70b statistics": 20.0,
        "strength error": 1e-6,
        "cds error": 2e-6,
        "longattn-8b window": 10.0,
        "longattn-8b against published": 250.0,
    }
    assert found.keys() <= gpu.TARGETS.keys()
    told, _, missing = gpu.target_table(results).partition("Not measured in this run: ")
    lines = {line.split("|")[1].strip(): line for line in told.splitlines() if line}
    assert "yes" in lines["LongAttn statistics, 8B layer"]
    assert "**no**" in lines["LongAttn statistics, 70B layer"]
    assert "two GPUs on one host" in missing
    assert "statistics" not in missing


def test_a_program_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    gpu = program("gpu")
    quick = {"curve": [], "long_windows": ["--quick", "--case", "ladm-layer"]}  # the first writes no figures
    monkeypatch.setattr(gpu, "QUICK", quick)
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "failed: curve" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "cpu.json").read_text("utf-8"))) == ["machine", "command", "long_windows"]
    assert "| LADM, TinyLlama-1.1B, one layer |" in (tmp_path / "cpu.md").read_text("utf-8")


def test_a_table_is_markdown_whose_numbers_have_three_digits():
    table = program("measuring").table(("what", "ms"), [("a", 1234.567), ("b", 0.123456), ("c", None), ("d", 1e-9)])
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["1,235", "0.123", "–", "1.0e-09"]


def test_a_machine_has_a_name_for_files():
    slug = program("measuring").slug
    assert slug({"gpu": "NVIDIA H100 80GB HBM3", "gpus": 1}) == "h100-80gb-hbm3"
    assert slug({"gpu": "NVIDIA H200", "gpus": 2}) == "h200-x2"
    assert slug({"cpu": "x"}) == "cpu"


def test_the_corpus_is_of_the_size_that_was_asked_for_and_never_repeats(tmp_path):
    shapes = program("shapes")
    documents = list(shapes.library_documents(3_000_000))
    assert sum(len(document["text"]) for document in documents) == 3_000_000
    assert len({document["text"] for document in documents}) == len(documents)
    assert len({document["id"] for document in documents}) == len(documents)
