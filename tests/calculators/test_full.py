from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import FAMILIES, VOCABULARY, make_checkpoint, make_config, make_unsupported
from longsift.calculators import LayerAttention
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel, attention_output
from longsift.calculators.interface import run
from longsift.errors import ModelError, UnsupportedModel, UsageError

OLD = int(transformers.__version__.split(".")[0]) < 5
FULL_FAMILIES = [f for f in FAMILIES if not (OLD and f == "olmoe")]  # no attention backend for it before 5.0
LENGTH = 130  # longer than the sliding windows of 48


def windows(length: int = LENGTH, batch: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


@cache
def eager_run(folder: str) -> Any:
    """What the library's own eager attention makes of `windows()`."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return whole.eval().model(input_ids=windows(), output_attentions=True, use_cache=False)


def probabilities(attention: LayerAttention, window: int | None) -> torch.Tensor:
    k = attention.k.repeat_interleave(attention.q.shape[1] // attention.k.shape[1], 1)
    logits = attention.q @ k.mT * attention.scale
    if attention.softcap is not None:
        logits = attention.softcap * (logits / attention.softcap).tanh()
    n = torch.arange(logits.shape[-1])
    distance = n[:, None] - n
    hidden = (distance < 0) | (distance >= (len(n) if window is None else window))
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def keep(attention: LayerAttention) -> LayerAttention:
    return attention


@pytest.mark.parametrize("family", [f for f in FULL_FAMILIES if f != "mistral-sliding"])
def test_captured_queries_and_keys_give_the_probabilities_of_an_eager_run(
    family: str, checkpoint: Callable[[str], str]
) -> None:
    folder = checkpoint(family)
    expected = eager_run(folder).attentions
    layers = FullModel.load(folder).reduce(windows(), keep)
    assert list(layers) == {"gemma2": [1], "gemma3": [2]}.get(family, [0, 1, 2])
    for layer, attention in layers.items():
        assert attention.layer == layer
        assert attention.k.shape == (2, 2, LENGTH, 16)  # grouped keys are not repeated
        # The last of them has passed through our attention in every layer before.
        torch.testing.assert_close(probabilities(attention, None), expected[layer], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FULL_FAMILIES)
def test_hidden_states_after_our_attention_are_those_of_an_eager_run(
    family: str, checkpoint: Callable[[str], str]
) -> None:
    folder = checkpoint(family)
    network = FullModel.load(folder)._network
    states: list[torch.Tensor] = []
    network.register_forward_hook(lambda *args: states.append(args[2].last_hidden_state))
    run(network, windows(), attention_output)
    expected = eager_run(folder).last_hidden_state
    assert float((states[0] - expected).norm() / expected.norm()) < 1e-5


def test_sliding_layers_are_run_but_left_out_until_they_see_the_whole_window(
    checkpoint: Callable[[str], str],
) -> None:
    model = FullModel.load(checkpoint("gemma3"))
    assert model.global_layers(49) == (2,)
    assert model.global_layers(48) == (0, 1, 2)
    assert list(model.reduce(windows(48), keep)) == [0, 1, 2]


def test_a_model_whose_every_layer_slides_has_nothing_to_measure(checkpoint: Callable[[str], str]) -> None:
    with pytest.raises(ModelError, match=r"No layer of .* sees the whole of a window of 130 tokens"):
        FullModel.load(checkpoint("mistral-sliding")).reduce(windows(), keep)


def test_chosen_layers_are_the_same_bits_and_later_layers_are_not_loaded(
    checkpoint: Callable[[str], str],
) -> None:
    ids = windows()
    every = FullModel.load(checkpoint("smollm3")).reduce(ids, keep)
    few = FullModel.load(checkpoint("smollm3"), layers=[1])
    assert len(few._network.layers) == 2
    chosen = few.reduce(ids, keep)
    assert list(chosen) == [1]
    assert torch.equal(chosen[1].q, every[1].q)
    assert torch.equal(chosen[1].k, every[1].k)


def test_the_forward_ends_at_the_last_measured_layer(checkpoint: Callable[[str], str]) -> None:
    model = FullModel.load(checkpoint("gemma2"))  # layer 1 of 0, 1, 2 is the last global one
    called: list[str] = []
    for name, module in model._network.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model.reduce(windows(), keep)
    assert "layers.0.mlp" in called
    assert not [name for name in called if name.startswith(("layers.1.mlp", "layers.2", "norm"))]


def test_a_reduction_may_give_the_output_too_and_is_asked_for_it_but_in_the_last_layer(
    checkpoint: Callable[[str], str],
) -> None:
    model, asked = FullModel.load(checkpoint("llama")), []

    def and_attend(attention: LayerAttention, value: torch.Tensor) -> tuple[LayerAttention, torch.Tensor]:
        asked.append(attention.layer)
        p = probabilities(attention, None)
        return attention, p @ value.repeat_interleave(attention.q.shape[1] // value.shape[1], 1)

    ours, plain = model.reduce(windows(), keep, and_attend=and_attend), model.reduce(windows(), keep)
    assert asked == [0, 1]
    for layer in (0, 1, 2):
        torch.testing.assert_close(ours[layer].q, plain[layer].q, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[0].q, plain[0].q)
    assert not torch.equal(ours[1].q, plain[1].q)


@pytest.mark.parametrize("layers", [[3], [-1], []], ids=["beyond the last", "negative", "none"])
def test_layers_that_do_not_exist_are_refused(layers: list[int], checkpoint: Callable[[str], str]) -> None:
    with pytest.raises(UsageError, match="has the layers 0 to 2"):
        FullModel.load(checkpoint("llama"), layers=layers)


def test_a_sliding_layer_asked_for_by_number_is_refused(checkpoint: Callable[[str], str]) -> None:
    model = FullModel.load(checkpoint("gemma3"), layers=[1, 2])
    with pytest.raises(ModelError, match=r"names \[1\] of .* sliding window of 48 .* global layers are \[2\]"):
        model.reduce(windows(), keep)
    assert list(model.reduce(windows(40), keep)) == [1, 2]


def test_another_rope_base_touches_the_global_layers_only(checkpoint: Callable[[str], str]) -> None:
    ids = windows(40)
    plain = FullModel.load(checkpoint("gemma3"), layers=[0]).reduce(ids, keep)
    other = FullModel.load(checkpoint("gemma3"), layers=[0], rope_theta=5e6).reduce(ids, keep)
    assert torch.equal(plain[0].k, other[0].k)
    plain = FullModel.load(checkpoint("gemma3")).reduce(windows(), keep)
    other = FullModel.load(checkpoint("gemma3"), rope_theta=5e6).reduce(windows(), keep)
    assert not torch.equal(plain[2].k, other[2].k)


def test_a_reduction_that_fails_leaves_the_model_usable(checkpoint: Callable[[str], str]) -> None:
    model = FullModel.load(checkpoint("llama"))

    def broken(attention: LayerAttention) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        model.reduce(windows(), broken)
    assert list(model.reduce(windows(), keep)) == [0, 1, 2]


def test_rope_that_grows_with_the_window_forgets_the_windows_before(tmp_path: Path) -> None:
    grows = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    folder = str(make_checkpoint(tmp_path / "dynamic", "llama", **grows))
    ids = torch.randint(160, (1, 300), generator=torch.Generator().manual_seed(0))

    def queries(model: FullModel, length: int) -> torch.Tensor:
        return model.reduce(ids[:, :length], lambda layer: layer.q.clone())[1]

    fresh, used = FullModel.load(folder), FullModel.load(folder)
    longest = queries(used, 300)
    assert torch.equal(queries(used, 100), queries(fresh, 100))
    assert torch.equal(queries(used, 300), longest)


def test_the_language_model_within_a_larger_model_is_found(tmp_path: Path) -> None:
    text = make_config("gemma3", layer_types=["full_attention", "sliding_attention"])
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    ids = windows()
    model = FullModel.load(str(tmp_path))
    seen = model.reduce(ids, keep)
    assert list(seen) == [0, 2]
    torch.testing.assert_close(FirstLayer.load(str(tmp_path)).queries_keys(ids).q, seen[0].q)
    theirs = whole.get_decoder().layers[2].self_attn.q_proj.weight
    assert torch.equal(model._network.layers[2].self_attn.q_proj.weight, theirs)


def test_a_file_with_another_name_is_loaded(tmp_path: Path, checkpoint: Callable[[str], str]) -> None:
    folder = make_checkpoint(tmp_path / "renamed", "qwen2")
    (folder / "model.safetensors").rename(folder / "weights-final.safetensors")
    ids = windows()
    renamed = FullModel.load(str(folder / "weights-final.safetensors")).reduce(ids, keep)
    assert torch.equal(renamed[2].q, FullModel.load(checkpoint("qwen2")).reduce(ids, keep)[2].q)


def test_a_sharded_checkpoint_is_loaded(tmp_path: Path, checkpoint: Callable[[str], str]) -> None:
    folder, ids = str(make_checkpoint(tmp_path / "sharded", "gemma2", sharded=True)), windows()
    sharded = FullModel.load(folder).reduce(ids, keep)
    assert torch.equal(sharded[1].q, FullModel.load(checkpoint("gemma2")).reduce(ids, keep)[1].q)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "lacking", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        FullModel.load(str(folder))


def test_an_architecture_that_cannot_be_observed_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'bloom' does not let its attention be observed"):
        FullModel.load(str(make_unsupported(tmp_path / "bloom")))


def unsupported_configs() -> dict[str, tuple[Any, str]]:
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": None,
    }
    return {
        "attention sinks": (transformers.GptOssConfig(**small, num_local_experts=2), "passes 's_aux'"),
        "linear attention": (
            transformers.Qwen3NextConfig(**small, layer_types=["linear_attention", "full_attention"]),
            "layers of the type 'linear_attention'",
        ),
        "both directions": (
            transformers.BertConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
            ),
            "attends to future tokens|masks more than the future|cannot build",
        ),
        "no attention at all": (
            transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1),
            "cannot be measured|cannot build",
        ),
        "encoder and decoder": (
            transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=16, num_layers=1, num_heads=2),
            "encoder with a decoder",
        ),
    }


@pytest.mark.parametrize("kind", unsupported_configs())
def test_attention_that_cannot_be_measured_faithfully_is_refused(kind: str, tmp_path: Path) -> None:
    config, message = unsupported_configs()[kind]
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        FullModel.load(str(tmp_path))


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "quantised", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="is quantised"):
        FullModel.load(str(folder))


def test_the_manifest_says_what_was_computed_and_how(checkpoint: Callable[[str], str]) -> None:
    description = FullModel.load(checkpoint("gemma3"), layers=[2]).describe()
    assert json.loads(json.dumps(description)) == description
    expected = {
        "kind": "full",
        "architecture": "gemma3_text",
        "dtype": "float32",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "layers": [2],
        "sliding_windows": [48, 48, None],
        "fused": [],  # a CPU keeps the network as it is
    }
    assert expected.items() <= description.items()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_gpu_gives_what_the_cpu_gives(family: str, checkpoint: Callable[[str], str]) -> None:
    folder, ids = checkpoint(family), windows(48)
    pairs = [(FirstLayer.load(folder, device=device).queries_keys(ids)) for device in ("cpu", "cuda")]
    whole = [FullModel.load(folder, device=device).reduce(ids, keep) for device in ("cpu", "cuda")]
    for ours, theirs in [pairs, *zip(*(layers.values() for layers in whole), strict=True)]:
        assert theirs.q.device.type == "cuda"
        torch.testing.assert_close(ours.q, theirs.q.cpu(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.k, theirs.k.cpu(), rtol=1e-3, atol=1e-3)
