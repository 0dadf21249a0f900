"""The published implementations' own numbers, through the public API and through `longsift score`."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

import longsift as package
from test_pipeline import longsift, table

GOLDEN = Path(__file__).parent / "golden"
ABLATIONS = {"No": None, "no_std": "no-std", "no_len_weight": "no-len-weight"}


def cases(method: str):
    for folder in sorted(GOLDEN.iterdir()):
        for case in json.loads((folder / "expected.json").read_text())[method]:
            yield pytest.param(folder, case, id=f"{folder.name}-{case['key']}")


def expected(folder: Path, name: str):
    with safe_open(folder / "expected.safetensors", "pt") as file:
        return file.get_tensor(name)


def scored_by_both(folder: Path, ids, tmp_path: Path, flags: dict[str, object]) -> list[dict]:
    """Rows from the API, which must be those of the command line on a Parquet file of token ids."""
    method = str(flags["method"])
    parameters = {key: value for key, value in flags.items() if key != "method" and value is not None}
    scorer = package.Scorer(method, model=str(folder), device="cpu", **parameters)
    by_api = scorer.score(ids.tolist()).to_pylist()

    pq.write_table(pa.table({"input_ids": ids.tolist()}), tmp_path / "ids.parquet")
    given = [
        part for key, value in parameters.items() if key != "detail" for part in (f"--{key.replace('_', '-')}", value)
    ]
    detail = ["--detail"] if "detail" in parameters else []
    out = tmp_path / "out"
    longsift("score", tmp_path / "ids.parquet", "-o", out, "--model", folder, "--method", method, *given, *detail, "-q")
    by_command = table(out / "scores").to_pylist()
    names = scorer.schema().names[6:]
    assert [[row[name] for name in names] for row in by_api] == [[row[name] for name in names] for row in by_command]
    return by_command


@pytest.mark.parametrize(("folder", "case"), cases("longattn"))
def test_longattn_gives_the_published_values_of_every_head(folder, case, tmp_path):
    ids = expected(folder, f"input_ids.L{case['L']}")
    flags = {"method": "longattn", "rope_theta": case["rope_theta"], "detail": True}
    rows = scored_by_both(folder, ids, tmp_path, flags)
    for column in ("dependency_strength", "variance"):
        published = expected(folder, f"{case['key']}.{column}")  # (windows, heads)
        for row, heads in zip(rows, published, strict=True):
            assert row[f"{column}_heads"] == pytest.approx(heads.tolist(), rel=1e-5)
            assert row[column] == pytest.approx(heads.double().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("folder", "case"), cases("ladm"))
def test_ladm_gives_the_published_values_of_every_layer(folder, case, tmp_path):
    ids = expected(folder, f"input_ids.L{case['L']}")
    flags = {"method": "ladm", "span": case["span"], "d_afs": case["d_afs"], "d_cds": case["d_cds"]}
    rows = scored_by_both(folder, ids, tmp_path, flags | {"ablation": ABLATIONS[case["ablation"]]})
    published = expected(folder, case["key"])  # (layers, windows)
    for row, layers in zip(rows, published.T, strict=True):
        assert row["cds_layers"] == pytest.approx(layers.tolist(), rel=1e-5)
        assert row["cds"] == pytest.approx(layers.double().mean().item(), rel=1e-5)
