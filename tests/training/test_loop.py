"""The training loop: Muon for many matrices, the clock's schedule, and several processes that end as one would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longsift.errors import UsageError
from longsift.training.configs import hybrid
from longsift.training.corpus import Packed, save_packed
from longsift.training.loop import Recipe, train
from longsift.training.muon import Muon

CONFIG = {
    **hybrid("qwen3", hidden=32, intermediate=32, layers=2, heads=2, global_layers=(1,), window=16),
    "vocab_size": 64,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def packed() -> Packed:
    tokens = np.random.default_rng(0).zipf(1.5, 5000).clip(1, 63).astype(np.uint16)
    return Packed(tokens, np.array([2500, 5000]), ("a", "b"), np.ones(64, dtype=np.int64))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has no Muon to compare with")
def test_muon_for_many_matrices_is_torchs_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 16), (32, 16), (16, 48), (16, 16))]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    fast = Muon(ours, lr=0.01, weight_decay=0.05)
    plain = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        fast.step()
        plain.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-3)


def test_the_stages_of_a_timed_run_are_shares_of_its_minutes():
    recipe = Recipe(stages=((2048, 60), (8192, 25), (32768, 15)), minutes=8)
    lengths = [recipe.length(recipe.progress(step=10**6, seconds=60 * minute)) for minute in (0, 4.7, 4.9, 6.7, 6.9)]
    assert lengths == [2048, 2048, 8192, 8192, 32768]
    assert recipe.progress(step=3, seconds=480) == 1


def test_a_timed_run_ends_in_time_and_goes_on_where_it_stopped(packed, tmp_path):
    recipe = Recipe(stages=((32, 1), (64, 1)), minutes=0.03, batch_tokens=256, warmup=2)
    state = tmp_path / "state.pt"
    first = train(packed, CONFIG, recipe, tmp_path, state=state, until=1)
    rest = train(packed, CONFIG, recipe, tmp_path, state=state)
    kept = torch.load(state, weights_only=True)
    assert len(first) == 1
    assert kept["step"] == 1 + len(rest)
    assert kept["seconds"] >= 60 * recipe.minutes
    assert train(packed, CONFIG, recipe, tmp_path, state=state) == []


def test_two_processes_train_what_one_trains(packed, tmp_path):
    save_packed(packed, tmp_path / "packed")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    recipe = Recipe(stages=((64, 3), (96, 2)), batch_tokens=480, micro_tokens=128, warmup=2, repeat_share=0.5)
    train(packed, CONFIG, recipe, tmp_path / "one")
    command = "train packed --config config.json --out two --stage 64:3 --stage 96:2 --batch-tokens 480"
    command += " --micro-tokens 128 --warmup 2 --repeat-share 0.5 --device cpu"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, "-m", "longsift.training.embedded", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        # Sums in another order; Muon's bfloat16 and the written bfloat16 make more of it.
        assert (weight.float() - two[name].float()).norm() <= 0.02 * weight.float().norm(), name


def test_windows_longer_than_the_models_positions_are_refused(packed, tmp_path: Path):
    with pytest.raises(UsageError, match="positions"):
        train(packed, {**CONFIG, "max_position_embeddings": 32}, Recipe(stages=((64, 1),)), tmp_path)
