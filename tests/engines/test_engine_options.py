"""Which flags go with which engine, and what is said where one cannot work."""

from __future__ import annotations

import pytest

from longsift.options import EngineOptions
from test_pipeline import longsift


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--partition", "main"], "--partition goes with --engine slurm"),
        (["--gpus-per-task", "0"], "--gpus-per-task goes with --engine slurm or ray"),
        (["--engine", "ray", "--partition", "main"], "--partition goes with --engine slurm"),
        (["--engine", "slurm", "--partition", "p", "--address", "a:1"], "--address goes with --engine ray"),
        (["--engine", "slurm"], "--engine slurm needs --partition; sinfo lists them"),
        (["--engine", "slurm", "--partition", "p", "--gpus-per-task", "2"], "--gpus-per-task is 0 or 1, not '2'"),
        (["--engine", "slurm", "--partition", "p", "--tasks", "0"], "--tasks is at least 1, not '0'"),
        (["--engine", "slurm", "--partition", "p", "--sbatch", "=lab"], "--sbatch takes options such as account=lab"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_work_are_refused_before_any_work(flags, message, corpus, tmp_path):
    output = longsift("run", corpus, "-o", tmp_path / "o", *flags, code=2)
    assert message in output
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("programs", "flags", "message"),
    [
        ([], [], "There is no sbatch here"),
        (["sbatch"], ["--workers", "2"], "--device and --workers go with --engine local"),
    ],
    ids=["no Slurm", "flags of the local engine"],
)
def test_what_slurm_cannot_do_is_said_before_windows_are_cut(programs, flags, message, corpus, tmp_path, monkeypatch):
    pytest.importorskip("datatrove", reason="needs longsift[datatrove]")
    for name in programs:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    output = longsift("run", corpus, "-o", tmp_path / "o", "--engine", "slurm", "--partition", "p", *flags, code=2)
    assert message in output
    assert not (tmp_path / "o").exists()


def test_further_options_of_sbatch_are_names_and_values():
    options = EngineOptions(engine="slurm", partition="p", sbatch="account=lab,--constraint=a100&nvlink, exclusive")
    assert options.further() == {"account": "lab", "constraint": "a100&nvlink", "exclusive": ""}
