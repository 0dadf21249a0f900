"""What a corpus, an address or a checkpoint cannot do: write elsewhere, show a secret, run code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from test_faults_storage import SECRETS, Files, bucket, host, server  # noqa: F401  (fixtures)
from test_pipeline import longsift

FLAGS = ["--method", "longattn", "--window", "256", "--shard-tokens", "1024", "--keep", "0.5"]
NAMES = [
    "../../evil",
    "/etc/evil",
    "a/b\\c",
    "nul\0evil",
    "..",
    "<script>alert(1)</script>",
    "line\nbreak",
    "'; DROP--",
]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> Iterator[str]:
    """Everything that a reader of a folder's files can see; values of tables too, which are compressed."""
    for path in files(folder):
        yield path.read_bytes().decode("utf-8", "replace")
        if path.suffix == ".parquet":
            yield str(pq.read_table(path).to_pylist()) + str(pq.read_schema(path).metadata)


def test_ids_groups_and_file_names_cannot_lead_a_run_out_of_its_folder(corpus, model, tmp_path):
    text = json.loads((corpus / "a.jsonl").read_text().splitlines()[0])["text"][:3000]
    source = tmp_path / "in" / "evil" / "%2e%2e; rm -rf"
    source.mkdir(parents=True)
    rows = [{"text": text, "id": name, "source": name, name: name} for name in NAMES]
    (source / "%2e%2e%2fevil.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = files(tmp_path)
    longsift("run", tmp_path / "in", "-o", tmp_path / "out", "--model", model, *FLAGS, "-q")
    new = files(tmp_path) - before
    assert all(path.is_relative_to(tmp_path / "out") for path in new)
    assert not any("evil" in str(path.relative_to(tmp_path / "out")) for path in new)
    assert not Path("/etc/evil").exists()
    windows = [row for path in (tmp_path / "out" / "windows").iterdir() for row in pq.read_table(path).to_pylist()]
    assert {row["doc_id"] for row in windows} == {row["group"] for row in windows} == set(NAMES)
    assert "<script>alert(1)" not in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    "address", ["http://reader:s3cr3t-pass@{host}/data/a.jsonl", "http://{host}/data/a.jsonl?sig=s1gnature"]
)
def test_a_run_shows_no_secret_of_an_address(host, corpus, model, tmp_path, monkeypatch, address):  # noqa: F811
    monkeypatch.setattr(Files, "data", (corpus / "a.jsonl").read_bytes() + b"broken\n")
    flags = ["--model", model, *FLAGS, "--max-bad", "1"]
    output = longsift("run", address.format(host=host), "-o", tmp_path / "out", *flags, "-v")
    output += longsift("status", tmp_path / "out")
    monkeypatch.setattr(Files, "data", b"")
    output += longsift("windows", address.format(host=host), "-o", tmp_path / "out", "--model", model, code=1)
    shown = [output, *contents(tmp_path / "out")]
    assert any(f"http://{host}/data/a.jsonl" in text for text in shown)
    assert not [text for text in shown if any(secret in text for secret in SECRETS)]


def test_a_run_shows_no_secret_of_the_environment(bucket, corpus, model, tmp_path, monkeypatch):  # noqa: F811
    bucket.put(str(corpus / "a.jsonl"), "corpus/a.jsonl")
    secrets = {name: f"s3cr3t-{name}" for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    bucket.clear_instance_cache()
    output = longsift("run", "s3://corpus", "-o", tmp_path / "out", "--model", model, *FLAGS, "-v")
    output += longsift("run", "s3://none", "-o", tmp_path / "none", "--model", model, *FLAGS, "-v", code=1)
    shown = [output, *contents(tmp_path)]
    assert any("s3://corpus/a.jsonl" in text for text in shown)
    assert not [text for text in shown if "s3cr3t" in text]


class Bomb:
    """Says on unpickling that it was."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
@pytest.mark.parametrize("method", ["longattn", "ladm"])
def test_a_checkpoint_of_pickles_is_refused_with_the_reason_and_not_opened(corpus, model, tmp_path, weights, method):
    checkpoint = tmp_path / "model"
    shutil.copytree(model, checkpoint, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"weight": Bomb(tmp_path / "exploded")}, checkpoint / weights)
    flags = ["--model", checkpoint, "--method", method, "--window", "4096"]
    output = longsift("run", corpus, "-o", tmp_path / "out", *flags, "-q", code=1)
    assert f"keeps its weights in {weights}; longsift reads safetensors only" in output
    assert not (tmp_path / "exploded").exists()


def test_code_of_a_checkpoint_is_not_run_unless_it_is_asked_for(corpus, model, tmp_path):
    checkpoint = tmp_path / "model"
    shutil.copytree(model, checkpoint)
    (checkpoint / "code.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    config = json.loads((checkpoint / "config.json").read_text())
    classes = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "unknown-of-all", "auto_map": classes}
    (checkpoint / "config.json").write_text(json.dumps(config))
    flags = ["--model", checkpoint, "--method", "longattn", "--window", "256"]
    output = longsift("run", corpus, "-o", tmp_path / "out", *flags, "-q", code=1)
    assert "trust-remote-code" in output
    assert not (tmp_path / "ran").exists()
