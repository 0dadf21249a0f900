"""What `longsift doctor` says of the attention backends of a machine."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from longsift import attention
from longsift.attention import chosen_backend
from longsift.cli import app
from longsift.status import attention_backends, machine

TYPES = ["float32", "bfloat16", "float16"]


def test_each_type_of_queries_has_a_backend_with_its_reason_and_a_check():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["attention"]
    assert [row["type"] for row in rows[:3]] == TYPES
    assert all(row["why"] for row in rows)
    assert all(row["check"].startswith("right to ") for row in rows)


def test_a_cpu_measures_in_blockwise_pytorch_because_it_is_no_gpu():
    for row in attention_backends(["cpu"]):
        assert row["backend"] == "blockwise PyTorch"
        assert row["why"] == "the kernels need a GPU; these are on the cpu"
        error = float(row["check"].removeprefix("right to "))
        assert error < 1e-4


def test_a_backend_that_is_wrong_is_told(monkeypatch):
    right = attention.far_statistics

    def wrong(q, k, distance, **how):
        return right(q, k, distance if how else distance + 1)

    monkeypatch.setattr(attention, "far_statistics", wrong)
    assert all(row["check"].startswith("WRONG by ") for row in attention_backends(["cpu"]))


def test_a_backend_that_fails_is_told_with_its_error(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(attention, "far_statistics", broken)
    assert {row["check"] for row in attention_backends(["cpu"])} == {"FAILS: RuntimeError: no compiler"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_in_triton_and_every_gpu_is_told():
    facts = machine()
    assert len(facts["gpus"]) == torch.cuda.device_count() == facts["processes that score"]
    assert len(facts["attention"]) == 3 * torch.cuda.device_count()
    for row in facts["attention"]:
        assert row["backend"].startswith("Triton ")
        assert row["check"].startswith("right to ")
    q = torch.empty(1, 2, 16, 64, device="cuda")
    assert chosen_backend(q) == ("triton", None)
    assert chosen_backend(q.double()) == (
        "cpu",
        "the backend triton takes float16, bfloat16 and float32; got torch.float64",
    )
