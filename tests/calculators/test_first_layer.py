from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import FAMILIES, VOCABULARY, make_checkpoint, make_unsupported
from longsift.calculators import LayerAttention, first_layer
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.errors import ModelError, UnsupportedModel, UsageError
from longsift.methods.longattn import LongAttn, far_distance

SLIDING_FIRST = ("gemma2", "gemma3", "mistral-sliding")
OLD = int(transformers.__version__.split(".")[0]) < 5
FULL_FAMILIES = [f for f in FAMILIES if not (OLD and f == "olmoe")]  # no attention backend for it before 5.0


def windows(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def of_full_model(folder: str, ids: torch.Tensor) -> LayerAttention:
    return FullModel.load(folder, layers=[0]).reduce(ids, lambda attention: attention)[0]


def same_bits(one: LayerAttention, other: LayerAttention) -> bool:
    return torch.equal(one.q, other.q) and torch.equal(one.k, other.k)


@cache
def rows_keep_their_bits() -> bool:
    """Whether this machine's matrix library gives a row the same bits at any place among enough other rows."""
    for width, counts in ((64, (40, 333, 1024)), (2048, (1024,))):
        rows = torch.randn(2500, width)
        for columns in (width // 2, width, 2 * width):
            weight = torch.randn(columns, width)
            product = nn.functional.linear(rows, weight)
            for n in counts:
                some = torch.randperm(len(rows))[:n]
                if not torch.equal(nn.functional.linear(rows[some], weight), product[some]):
                    return False
    return True


def agree_with_full_model(ours: LayerAttention, theirs: LayerAttention) -> bool:
    """Bit for bit, where a row of a matrix product has bits of its own; else to a few roundings."""
    if rows_keep_their_bits():
        return same_bits(ours, theirs)
    pairs = ((ours.q, theirs.q), (ours.k, theirs.k))
    return all(float((a - b).abs().max() / b.abs().max()) < 1e-6 for a, b in pairs)


@pytest.mark.parametrize("family", [f for f in FULL_FAMILIES if f not in SLIDING_FIRST])
def test_queries_and_keys_are_those_of_the_full_model_bit_for_bit(
    family: str, checkpoint: Callable[[str], str]
) -> None:
    calculator, whole = FirstLayer.load(checkpoint(family)), FullModel.load(checkpoint(family), layers=[0])
    for length, batch in ((40, 3), (333, 2), (1024, 2), (2500, 1)):
        ids = windows(length, batch)
        ours, theirs = calculator.queries_keys(ids), whole.reduce(ids, lambda attention: attention)[0]
        assert agree_with_full_model(ours, theirs)
        assert (ours.layer, ours.scale, ours.softcap) == (theirs.layer, theirs.scale, theirs.softcap)


def test_a_first_layer_without_positions_is_that_of_the_embedded_model() -> None:
    ids = torch.randint(8192, (1, 1500), generator=torch.Generator().manual_seed(0))
    ids[0, 750:] = ids[0, :750]  # the same tokens in other places
    ours = FirstLayer.load("embedded").queries_keys(ids)
    assert agree_with_full_model(ours, of_full_model("embedded", ids))
    assert torch.equal(ours.q[:, :, 750:], ours.q[:, :, :750])
    assert torch.equal(ours.k[:, :, 750:], ours.k[:, :, :750])


@pytest.mark.parametrize("family", SLIDING_FIRST)
def test_a_sliding_first_layer_says_how_much_it_sees(family: str, checkpoint: Callable[[str], str]) -> None:
    folder, ids = checkpoint(family), windows(48)
    ours, theirs = FirstLayer.load(folder).queries_keys(ids), of_full_model(folder, ids)
    assert agree_with_full_model(ours, theirs)
    assert ours.softcap == theirs.softcap == (5.0 if family == "gemma2" else None)
    assert ours.sliding_window == theirs.sliding_window == 48


@pytest.mark.parametrize("skip_sink", [False, True], ids=["with-sink", "without-sink"])
@pytest.mark.parametrize("family", SLIDING_FIRST)
def test_longattn_of_a_sliding_first_layer_is_that_of_the_models_own_map(
    family: str, skip_sink: bool, checkpoint: Callable[[str], str]
) -> None:
    folder, ids = checkpoint(family), windows(188)  # far keys are from 47 tokens back on, and 47 back is the last seen
    method, calculator = LongAttn(detail=True, skip_sink=skip_sink), FirstLayer.load(folder)
    network = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    for length in (188, 48, 101):
        some = ids[:, :length]
        with torch.inference_mode():
            maps = network(some, output_attentions=True, use_cache=False).attentions[0].double()
        assert (maps[0, 0, -1] > 0).sum() == min(length, 48)
        far = maps.tril(-far_distance(length))
        far[..., : 128 if skip_sink else 0] = 0
        measured = method.measure(calculator, some)
        torch.testing.assert_close(
            measured["dependency_strength_heads"].double(), far.sum((2, 3)) / length, rtol=2e-5, atol=1e-12
        )
        torch.testing.assert_close(measured["variance_heads"].double(), far.flatten(2).var(2), rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("family", SLIDING_FIRST)
def test_a_first_layer_that_slides_within_the_far_distance_is_refused(
    family: str, checkpoint: Callable[[str], str]
) -> None:
    calculator = FirstLayer.load(checkpoint(family))
    with pytest.raises(ModelError, match=r"sees only the last 48 tokens.* window of 192 are 48 or more.*--method ladm"):
        LongAttn().measure(calculator, windows(192))


def test_a_wide_layer_agrees_bit_for_bit_too(tmp_path: Path) -> None:
    # Matrix libraries take other kernels for wide layers; windows of at least BLOCK tokens take the table's.
    wide = {"hidden_size": 2048, "num_attention_heads": 16, "head_dim": 128, "intermediate_size": 8}
    folder = str(make_checkpoint(tmp_path / "wide", "llama", layers=1, **wide))
    ids = windows(1100, batch=1)
    assert agree_with_full_model(FirstLayer.load(folder).queries_keys(ids), of_full_model(folder, ids))


def test_a_window_gives_the_same_bits_whatever_was_computed_before_or_with_it(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "wide", "qwen3", vocab_size=2500))  # more than two blocks of a table
    some = torch.randint(2500, (1, 200), generator=torch.Generator().manual_seed(0))
    others = some % 20 + 2480
    fresh = FirstLayer.load(folder).queries_keys(some)
    used = FirstLayer.load(folder)
    used.queries_keys(others)
    together = used.queries_keys(torch.cat([others, some]))
    assert torch.equal(together.q[1:], fresh.q)
    assert torch.equal(together.k[1:], fresh.k)


def test_a_vocabulary_too_large_for_tables_gives_the_same(
    checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = checkpoint("phi3"), windows(200)
    kept = FirstLayer.load(folder).queries_keys(ids)
    monkeypatch.setattr(first_layer, "TABLE_BYTES", 0)
    assert agree_with_full_model(FirstLayer.load(folder).queries_keys(ids), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_half_precision(dtype: torch.dtype, checkpoint: Callable[[str], str]) -> None:
    folder, ids = checkpoint("llama"), windows(100)
    ours = FirstLayer.load(folder, dtype=dtype).queries_keys(ids)
    theirs = FullModel.load(folder, dtype=dtype, layers=[0]).reduce(ids, lambda attention: attention)[0]
    assert ours.q.dtype == ours.k.dtype == dtype
    torch.testing.assert_close(ours.q, theirs.q, rtol=2e-2, atol=2e-2 * float(theirs.q.abs().max()))


def test_only_the_weights_on_the_way_to_queries_and_keys_are_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "sharded", "qwen2", layers=6, sharded=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 6
    needed = [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        *(f"model.layers.0.self_attn.{p}_proj.{w}" for p in "qk" for w in ("weight", "bias")),
    ]
    files = {index["weight_map"][name] for name in needed}
    tensors = {k: v for file in files for k, v in load_file(folder / file).items()}
    headers = sum(int.from_bytes((folder / f).read_bytes()[:8], "little") + 8 for f in files)
    expected = sum(tensors[name].nbytes for name in needed) + headers
    expected += (folder / "model.safetensors.index.json").stat().st_size
    calculator = FirstLayer.load(str(folder))
    assert calculator.describe()["bytes_read"] == expected
    # Shards that hold nothing of the first layer's queries and keys are not even opened.
    for file in set(index["weight_map"].values()) - files:
        (folder / file).unlink()
    assert same_bits(FirstLayer.load(str(folder)).queries_keys(windows(64)), calculator.queries_keys(windows(64)))


def test_a_calculator_can_be_loaded_in_inference_mode(checkpoint: Callable[[str], str]) -> None:
    ids = windows(64)
    with torch.inference_mode():
        loaded = FirstLayer.load(checkpoint("llama")).queries_keys(ids)
    assert same_bits(loaded, FirstLayer.load(checkpoint("llama")).queries_keys(ids))


def test_another_rope_base_keeps_the_rest_of_the_rope_settings(
    tmp_path: Path, checkpoint: Callable[[str], str]
) -> None:
    ids = windows(300)
    ours = FirstLayer.load(checkpoint("llama"), rope_theta=2.5e6)
    made_so = make_checkpoint(tmp_path / "theta", "llama", rope_theta=2.5e6)
    assert same_bits(ours.queries_keys(ids), FirstLayer.load(str(made_so)).queries_keys(ids))
    assert not same_bits(ours.queries_keys(ids), FirstLayer.load(checkpoint("llama")).queries_keys(ids))
    rope = ours.describe()["rope"]
    assert (rope["rope_theta"], rope["factor"], rope["rope_type"]) == (2.5e6, 8.0, "llama3")


def test_rope_that_grows_with_the_window_is_that_of_each_window_alone(tmp_path: Path) -> None:
    grows = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    folder, ids = str(make_checkpoint(tmp_path / "dynamic", "llama", **grows)), windows(300)
    calculator = FirstLayer.load(folder)
    for length in (300, 100):
        assert agree_with_full_model(calculator.queries_keys(ids[:, :length]), of_full_model(folder, ids[:, :length]))


def test_the_manifest_says_what_was_computed_and_how(checkpoint: Callable[[str], str]) -> None:
    description = FirstLayer.load(checkpoint("qwen3")).describe()
    assert json.loads(json.dumps(description)) == description
    expected = {
        "kind": "first_layer",
        "model": checkpoint("qwen3"),
        "revision": None,
        "architecture": "qwen3",
        "dtype": "float32",
        "device": "cpu",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_length": 4096,
    }
    assert expected.items() <= description.items()


def test_an_architecture_that_cannot_be_observed_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'bloom' does not let its attention be observed"):
        FirstLayer.load(str(make_unsupported(tmp_path / "bloom")))


def test_queries_that_depend_on_more_than_the_token_are_refused(
    checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A first layer whose projections also read the neighbour, as a convolution before them would make them.
    forward = transformers.models.llama.modeling_llama.LlamaRMSNorm.forward

    def leaky(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = forward(self, x)
        return normed + 0.1 * normed.roll(1, dims=1)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRMSNorm, "forward", leaky)
    with pytest.raises(UnsupportedModel, match="depend on more than the token and its position"):
        FirstLayer.load(checkpoint("llama"))


def test_a_rope_base_for_a_model_without_rope_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no RoPE"):
        FirstLayer.load(str(tmp_path), rope_theta=1e6)


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "misfit", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"embed_tokens.weight' has the shape \(100, 64\)"):
        FirstLayer.load(str(folder))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, VOCABULARY + 7, 5]]), f"Token id {VOCABULARY + 7} is outside .* of {VOCABULARY}"),
        (torch.tensor([[3, -2]]), "Token id -2 is outside"),
        (torch.tensor([3, 4]), r"must be integers of shape \(batch, length\)"),
        (torch.tensor([[0.5]]), "must be integers"),
        (torch.empty(1, 0, dtype=torch.int64), "must be integers"),
    ],
    ids=["too large", "negative", "one window without batch", "floats", "no token"],
)
def test_ids_that_the_model_cannot_read_are_refused(
    ids: torch.Tensor, message: str, checkpoint: Callable[[str], str]
) -> None:
    with pytest.raises(ModelError, match=message):
        FirstLayer.load(checkpoint("llama")).queries_keys(ids)
    with pytest.raises(ModelError, match=message):
        FullModel.load(checkpoint("llama")).reduce(ids, lambda attention: attention)
