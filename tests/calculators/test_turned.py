"""The first layer by the look-up kernel gives what the model's own code gives: on a GPU, else in the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernel is imported

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if ON_GPU else []

import transformers  # noqa: E402

from checkpoints import FAMILIES, VOCABULARY, make_checkpoint  # noqa: E402
from longsift.attention import far_statistics  # noqa: E402
from longsift.calculators import first_layer  # noqa: E402
from longsift.calculators.first_layer import FirstLayer  # noqa: E402
from longsift.errors import UnsupportedModel  # noqa: E402

OLD = int(transformers.__version__.split(".")[0]) < 5
NEIGHBOURS = ("cohere",)  # RoPE turns neighbouring numbers, which the kernel leaves to the model's own code
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32]

# What is changed in a Llama, by name: RoPE of other kinds, and a head that is no power of 2.
ROPES = {
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "head-of-40": {"head_dim": 40, "rope_scaling": None},
}


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_layer, "kernel_applies", lambda device: True)


def load(folder: str, dtype: torch.dtype | None = None) -> FirstLayer:
    return FirstLayer.load(folder, device=DEVICE, dtype=dtype or torch.float32)


def load_plain(folder: str, dtype: torch.dtype | None = None) -> FirstLayer:
    """The same by the model's own code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_layer, "kernel_applies", lambda device: False)
        return load(folder, dtype)


def windows(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)


def assert_alike(folder: str, length: int, dtype: torch.dtype, *, kernel: bool) -> None:
    ours, plain = load(folder, dtype), load_plain(folder, dtype)
    assert ours.describe()["look_up"] == ("kernel" if kernel else "model")
    assert plain.describe() == ours.describe() | {"look_up": "model"}
    made, expected = ours.queries_keys(windows(length, 2)), plain.queries_keys(windows(length, 2))
    for name in ("layer", "scale", "softcap", "sliding_window"):
        assert getattr(made, name) == getattr(expected, name)
    for one, other in ((made.q, expected.q), (made.k, expected.k)):
        assert one.dtype == other.dtype == dtype
        # The model rounds twice products and once a sum, the kernel once.
        torch.testing.assert_close(one, other, rtol=0, atol=3 * torch.finfo(dtype).eps * float(other.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [f for f in FAMILIES if not (OLD and f == "olmoe")])
def test_queries_and_keys_are_those_of_the_models_own_code(
    family: str, dtype: torch.dtype, checkpoint: Callable[[str], str]
) -> None:
    assert_alike(checkpoint(family), 333, dtype, kernel=family not in NEIGHBOURS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", ROPES)
def test_rope_of_every_kind_is_that_of_the_model(rope: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / rope, "llama", layers=1, **ROPES[rope]))
    assert_alike(folder, 1025, dtype, kernel=True)


@pytest.mark.skipif(not hasattr(transformers, "Ministral3Config"), reason="a newer model than this transformers")
@pytest.mark.parametrize("limit", [4096, 1024], ids=["known-at-load", "only-in-longer-windows"])
def test_queries_that_grow_with_the_position_are_not_taken_for_turned_ones(limit: int, tmp_path: Path) -> None:
    # From position 2048 on, the layer makes its queries larger.
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    config = transformers.Ministral3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=limit,
        rope_parameters=rope | {"original_max_position_embeddings": 2048},
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    calculator, ids = load(str(tmp_path)), windows(3000)
    assert calculator.queries_keys(ids[:, :2048]).q.isfinite().all()
    if limit == 1024:
        with pytest.raises(UnsupportedModel, match="with the positions of windows of 3000 tokens"):
            calculator.queries_keys(ids)
    else:
        assert calculator.describe()["look_up"] == "model"
        assert torch.equal(calculator.queries_keys(ids).q, load_plain(str(tmp_path)).queries_keys(ids).q)


def test_a_layer_that_does_not_use_its_positions_is_not_turned() -> None:
    ids = torch.randint(8192, (1, 600), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids[0, 300:] = ids[0, :300]  # the same tokens in other places
    calculator = load("embedded")
    made = calculator.queries_keys(ids)
    assert calculator.describe()["look_up"] == "kernel"
    assert torch.equal(made.q[:, :, 300:], made.q[:, :, :300])
    torch.testing.assert_close(made.q, load_plain("embedded").queries_keys(ids).q)


def test_a_vocabulary_of_many_blocks_has_every_row(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "wide", "qwen3", layers=1, vocab_size=2500))
    ids = torch.randperm(2500, generator=torch.Generator().manual_seed(0))[None].to(DEVICE)
    made, expected = load(folder).queries_keys(ids), load_plain(folder).queries_keys(ids)
    torch.testing.assert_close(made.q, expected.q, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(made.k, expected.k, rtol=1e-5, atol=3e-6)


def test_a_window_is_the_same_bits_alone_and_among_others(checkpoint: Callable[[str], str]) -> None:
    calculator, ids = load(checkpoint("llama")), windows(301, 3)
    together, alone = calculator.queries_keys(ids), calculator.queries_keys(ids[1:2])
    assert torch.equal(together.q[1], alone.q[0])
    assert torch.equal(together.k[1], alone.k[0])


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "model"])
def test_some_rows_and_some_heads_are_those_of_the_whole(kernel: bool, checkpoint: Callable[[str], str]) -> None:
    calculator, ids = (load if kernel else load_plain)(checkpoint("llama")), windows(120, 2)
    rows = torch.tensor([0, 7, 8, 119], device=DEVICE)
    whole, part = calculator.queries_keys(ids), calculator.queries_keys(ids, rows=rows, kv_heads=range(1, 2))
    assert torch.equal(part.q, whole.q[:, 2:4][:, :, rows])
    assert torch.equal(part.k, whole.k[:, 1:2])


def test_heads_are_shared_out_by_the_size_of_their_queries(
    checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calculator = load(checkpoint("llama"))  # 2 key heads, each of 2 heads of 16 numbers
    monkeypatch.setattr(first_layer, "QUERY_BYTES", 100 * 2 * 16 * 4)
    assert calculator.shares(50) == [range(2)]
    assert calculator.shares(100) == calculator.shares(10**9) == [range(1), range(1, 2)]
    assert load_plain(checkpoint("llama")).shares(10**9) == [range(2)]


def test_lengths_beyond_those_that_are_kept_are_turned_anew(checkpoint: Callable[[str], str]) -> None:
    calculator = load(checkpoint("llama"))
    first = calculator.queries_keys(windows(30)).q
    for length in range(31, 37):
        calculator.queries_keys(windows(length))
    assert torch.equal(calculator.queries_keys(windows(30)).q, first)


def test_queries_that_depend_on_more_than_the_token_are_refused(
    checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = transformers.models.llama.modeling_llama.LlamaRMSNorm.forward

    def leaky(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = forward(self, x)
        return normed + 0.1 * normed.roll(1, dims=1)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRMSNorm, "forward", leaky)
    with pytest.raises(UnsupportedModel, match="depend on more than the token and its position"):
        load(checkpoint("llama"))


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_the_second_call_does_not_wait_for_the_gpu(checkpoint: Callable[[str], str]) -> None:
    calculator, ids, others = load(checkpoint("qwen3")), windows(500, 2), windows(500, 3)
    calculator.queries_keys(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        calculator.queries_keys(others)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_share_of_the_heads_takes_only_its_share_of_the_memory(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    calculator = load(str(make_checkpoint(tmp_path / "wide", "llama", layers=1, **wide)), torch.bfloat16)
    length = 1 << 17
    ids = windows(length)
    calculator.queries_keys(ids, kv_heads=range(1))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer = calculator.queries_keys(ids, kv_heads=range(1))
    assert layer.q.shape == (1, 4, length, 128)
    made = layer.q.nbytes + layer.k.nbytes
    assert torch.cuda.max_memory_allocated() - before <= made + (1 << 20)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_far_statistics_of_a_share_of_the_heads_are_the_same_bits(checkpoint: Callable[[str], str]) -> None:
    calculator, ids = load(checkpoint("llama"), torch.bfloat16), windows(1111, 3)
    whole = calculator.queries_keys(ids)
    far = far_statistics(whole.q, whole.k, 300)
    for kv_head in range(2):
        part = calculator.queries_keys(ids[1:2], kv_heads=range(kv_head, kv_head + 1))
        some = far_statistics(part.q, part.k, 300)
        heads = slice(2 * kv_head, 2 * kv_head + 2)
        assert torch.equal(some.mass[0], far.mass[1, heads])
        assert torch.equal(some.squares[0], far.squares[1, heads])
