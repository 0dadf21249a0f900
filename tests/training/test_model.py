"""Small models of several architectures: the fast attention computes what transformers' own does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longsift.errors import InputError
from longsift.training.configs import CONFIGS, count_parameters, find_config, hybrid
from longsift.training.model import compiled_losses, load_model, new_model, save_model, token_losses

HYBRIDS = ("qwen3", "smollm3", "gemma3_text")


def tiny(model_type: str, window: int = 16) -> dict:
    config = hybrid(model_type, hidden=32, intermediate=48, layers=3, heads=4, global_layers=(1,), window=window)
    return {**config, "vocab_size": 320, "head_dim": 16}


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 320, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", HYBRIDS)
@pytest.mark.parametrize("length", [9, 16, 71])
def test_a_saved_hybrid_gives_the_losses_of_eager_transformers(model_type, length, tmp_path):
    config = tiny(model_type)
    save_model(new_model(config, seed=0), config, tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = random_ids(length + 1)
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(eager(ids[:, :-1]).logits.mT, ids[:, 1:], reduction="none")
        assert torch.allclose(token_losses(load_model(tmp_path), ids[:, :-1], ids[:, 1:]), expected, atol=2e-6)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_only_the_global_layer_of_a_hybrid_sees_beyond_its_window(model_type):
    ids = random_ids(64)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 320
    for layers, reaches in (((), False), ((1,), True)):
        config = {**tiny(model_type), "layer_types": ["sliding_attention"] * 3}
        for layer in layers:
            config["layer_types"][layer] = "full_attention"
        model = new_model(config, seed=0).eval()
        with torch.inference_mode():
            # Three layers of 16 tokens reach 45 tokens back; the last token is 63 away from the changed one.
            same = torch.equal(model(ids).logits[:, -1], model(changed).logits[:, -1])
        assert same is not reaches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_compiled_losses_and_gradients_on_a_gpu_are_those_of_eager_transformers(model_type):
    config = {**hybrid(model_type, layers=4, global_layers=(2,), window=200)}
    model = new_model(config, seed=0).cuda()
    fast = new_model(config, seed=0).cuda()
    model.set_attn_implementation("eager")
    losses_of = compiled_losses(fast)
    ids = torch.randint(0, 8192, (2, 1025), generator=torch.Generator().manual_seed(0)).cuda()
    expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.mT, ids[:, 1:], reduction="none")
    with torch.autocast("cuda", torch.bfloat16):
        found = losses_of(fast, ids[:, :-1], ids[:, 1:])
    expected.mean().backward()
    found.mean().backward()
    assert (found - expected).abs().mean() < 0.01
    for (name, weight), other in zip(fast.named_parameters(), model.parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(weight.grad.flatten(), other.grad.flatten(), 0) > 0.99, name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_named_model_has_the_size_that_is_said(name):
    size = count_parameters(CONFIGS[name])
    assert size <= (14_800_000 if "large" in name else 7_450_000)
    assert size > 7_000_000


def test_a_configuration_can_come_from_a_file(tmp_path: Path):
    (tmp_path / "c.json").write_text(json.dumps(tiny("qwen3")))
    assert find_config(str(tmp_path / "c.json")) == tiny("qwen3")
    with pytest.raises(InputError, match="embedded, smollm3"):
        find_config(str(tmp_path / "none.json"))
