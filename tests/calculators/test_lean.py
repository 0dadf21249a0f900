"""The fused parts of a network compute what they replace: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy says it of infinities in the interpreter
    *([pytest.mark.gpu] * ON_GPU),
]

from checkpoints import make_config  # noqa: E402
from longsift.calculators.full import attention_output  # noqa: E402
from longsift.calculators.fused import gate_, is_dense, rms_norm, rotate  # noqa: E402
from longsift.calculators.interface import BACKEND, observed  # noqa: E402
from longsift.calculators.lean import make_lean  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PARTS = {
    "llama": ["norms", "gated MLPs", "RoPE"],
    "qwen3": ["norms", "gated MLPs", "RoPE"],
    "gemma2": ["norms", "gated MLPs", "RoPE"],
    "gemma3": ["norms", "gated MLPs", "RoPE"],
    "mistral-sliding": ["norms", "gated MLPs", "RoPE"],
    "smollm3": ["norms", "gated MLPs", "RoPE"],
    "phi3": ["norms", "RoPE"],  # gate and up in one projection
    "cohere": ["gated MLPs"],  # layer norms, and RoPE of neighbouring pairs
}


@pytest.fixture(autouse=True)
def _new_memory_holds_nan() -> Iterator[None]:
    """So that an entry that no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the filling is what is wanted of it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert exact.dtype == torch.float64
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=max(eps, 1e-6), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 7, 64), (2, 3, 5, 576), (9, 2048), (3, 1), (1, 5000)], ids=str)
def test_the_norm_is_the_root_mean_square_norm(shape: tuple[int, ...], offset: float, dtype: torch.dtype) -> None:
    x, weight = numbers(*shape, dtype=dtype), numbers(shape[-1], dtype=dtype, seed=1)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (weight.double() + offset)
    close(rms_norm(x, weight, 1e-3, offset), exact)


def test_a_norm_of_heads_keeps_their_order_in_memory() -> None:
    x = numbers(2, 9, 4, 16).transpose(1, 2)  # (batch, heads, length, head_dim), as projections leave it
    out = rms_norm(x, numbers(16, seed=1), 1e-6)
    assert out.stride() == x.stride()
    assert torch.equal(out, rms_norm(x.contiguous(), numbers(16, seed=1), 1e-6))
    with pytest.raises(ValueError, match="must be dense"):
        rms_norm(numbers(4, 32)[:, :16], numbers(16), 1e-6)


def test_rows_are_dense_in_any_order_and_without_gaps() -> None:
    x = numbers(2, 3, 1, 4)
    assert is_dense(x)
    assert is_dense(x.transpose(0, 1))
    assert not is_dense(x.transpose(1, 3))
    assert not is_dense(x[:, :2])
    assert not is_dense(x[..., :3])
    assert not is_dense(x[:1].expand(2, -1, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_the_gate_is_the_activation_times_the_other_half(kind: str, dtype: torch.dtype) -> None:
    gate, up = numbers(3, 1999, dtype=dtype) * 4, numbers(3, 1999, dtype=dtype, seed=1)
    gate[0, :3] = torch.tensor([-200.0, 0.0, 200.0])
    plain = functional.silu if kind == "silu" else lambda x: functional.gelu(x, approximate="tanh")
    exact = plain(gate.double()) * up.double()
    assert gate_(gate, up, kind).data_ptr() == gate.data_ptr()
    close(gate, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "head_dim"),
    [pytest.param(4, 2, 33, 16, id="H4-K2-L33-d16"), pytest.param(3, 1, 100, 60, id="H3-K1-L100-d60")],
)
def test_rope_turns_both_halves(heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k = (numbers(2, length, n, head_dim, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads))
    cos, sin = (numbers(1, length, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    for ours, x in zip(rotate(q, k, cos, sin), (q, k), strict=True):
        first, second = x.double().chunk(2, -1)
        close(ours, x.double() * cos.double() + torch.cat((-second, first), -1) * sin.double())
        assert ours.stride() == x.stride()


def build(family: str, dtype: torch.dtype, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = make_config(family, layers=2, **changes)
    network = transformers.AutoModel.from_config(config, attn_implementation=BACKEND, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return network.to(DEVICE).requires_grad_(False)


def hidden_states(network: nn.Module) -> torch.Tensor:
    ids = torch.randint(160, (1, 70), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with observed(attention_output):
        states: torch.Tensor = network(input_ids=ids, use_cache=False).last_hidden_state
    return states


@pytest.mark.parametrize("family", PARTS)
def test_a_lean_network_is_the_plain_one(family: str) -> None:
    network = build(family, torch.float32)
    plain = hidden_states(network)
    assert make_lean(network) == PARTS[family]
    lean = hidden_states(network)
    assert not torch.equal(lean, plain)
    torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter truncates to bfloat16")
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_precision_is_as_near_to_float32_as_it_was(family: str, dtype: torch.dtype) -> None:
    network = build(family, dtype)
    exact = hidden_states(copy.deepcopy(network).float())
    plain = hidden_states(network).float()
    assert make_lean(network) == PARTS[family]
    lean = hidden_states(network).float()
    assert (lean - exact).norm() < 1.2 * (plain - exact).norm()


class OtherInputs(nn.Module):
    """An MLP of the usual parts that wants to know more than the hidden states."""

    def forward(self, x: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not called without routes")


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda network: setattr(network.layers[0].mlp, "act_fn", nn.GELU()), "layers.0.mlp"),
        (lambda network: setattr(network.layers[1].mlp, "forward", lambda x: 1.1 * x), "layers.1.mlp"),
        (lambda network: setattr(network.norm, "variance_epsilon", -1.0), "norm"),
        (lambda network: setattr(network.layers[0].mlp, "__class__", OtherInputs), "layers.0.mlp"),
    ],
    ids=["another activation", "another formula", "nonsense", "other inputs"],
)
def test_a_part_that_computes_something_else_stays(change: Callable[[nn.Module], None], kept: str) -> None:
    network = build("llama", torch.float32)
    change(network)
    before = {name: type(module) for name, module in network.named_modules()}
    assert make_lean(network) == PARTS["llama"]  # the other layers'
    same = [name for name, module in network.named_modules() if type(module) is before[name]]
    assert kept in same
    assert "layers.0.input_layernorm" not in same


def test_only_the_given_network_changes() -> None:
    lean, plain = build("llama", torch.float32), build("llama", torch.float32)
    before = hidden_states(plain)
    make_lean(lean)
    assert torch.equal(hidden_states(plain), before)


def test_a_lean_network_is_freed_with_its_last_use() -> None:
    network = build("llama", torch.float32)
    make_lean(network)
    weights = [weakref.ref(parameter) for parameter in network.parameters()]
    hidden_states(network)
    gc.disable()  # which on a GPU nobody calls in time
    try:
        del network
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()
