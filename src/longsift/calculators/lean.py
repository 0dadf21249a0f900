"""A leaner network for a GPU: norms, gated MLPs and RoPE that take one pass over memory in place of five to ten.

Between matrix products, transformers runs one small kernel an operation, which on a GPU costs a third of the time
that the attention of a 32,768-token window does. Parts of a network are replaced one by one, on the loaded instance
alone, and by what they compute: whatever its architecture, a part is replaced when, on inputs made for the purpose,
its replacement gives the same numbers to a few roundings of their type.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, get_args

import torch
from torch import Tensor, nn

ROUNDINGS = 4.0  # units in the last place, of a number or of its row's root mean square, that may differ
ROPE = "apply_rotary_pos_emb"  # what transformers calls the function in every architecture


@torch.inference_mode()
def make_lean(network: nn.Module) -> list[str]:
    """Replace what can be replaced by fused kernels, in place.

    Args:
        network: a decoder of transformers on a GPU, in the type that it runs in.

    Returns:
        What was replaced: "norms", "gated MLPs", "RoPE"; nothing where there is no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        return []
    parts = {"norms": _lean_norm, "gated MLPs": _lean_mlp, "RoPE": _lean_rope}
    found = []
    for name, lean in parts.items():
        replaced = False
        for module in network.modules():
            forward = lean(module)
            if forward is not None:
                module.forward = forward
                replaced = True
        if replaced:
            found.append(name)
    return found


def _fused() -> Any:
    return importlib.import_module("longsift.calculators.fused")


def _lean_norm(module: nn.Module) -> Callable[..., Tensor] | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    if len(list(module.parameters())) > 1 or len(weight) > _fused().LARGEST_ROW:
        return None
    # Rows from small to large, so that another eps shows, and off zero, so that a mean taken away does.
    x = (_numbers(12, len(weight), like=weight) + 1) * torch.logspace(-3, 1, 12).to(weight)[:, None]
    for offset in (0.0, 1.0):
        if all(_agree(_fused().rms_norm(each, weight, eps, offset), module.forward(each)) for each in (x, x.float())):
            return functools.partial(_norm, module.forward, weight, eps, offset)
    return None


def _norm(plain: Callable[[Tensor], Tensor], weight: Tensor, eps: float, offset: float, x: Tensor) -> Tensor:
    if x.dtype != weight.dtype or x.shape[-1] != len(weight) or not _fused().is_dense(x):
        return plain(x)
    out: Tensor = _fused().rms_norm(x, weight, eps, offset)
    return out


def _lean_mlp(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    activation = getattr(module, "act_fn", None)
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and activation):
        return None
    x = _numbers(16, gate.in_features, like=gate.weight)
    grid = torch.linspace(-12, 12, 4097, device=x.device)
    for kind in get_args(_fused().Gate):
        # In half precision alone, GELU by its tanh formula could pass for the exact one.
        if _agree(_fused().gate_(grid.clone(), torch.ones_like(grid), kind), activation(grid)):
            forward = functools.partial(_mlp, gate, up, down, kind)
            return forward if _agree(forward(x), module.forward(x)) else None
    return None


def _mlp(gate: nn.Linear, up: nn.Linear, down: nn.Linear, kind: str, x: Tensor) -> Tensor:
    out: Tensor = down(_fused().gate_(gate(x), up(x), kind))
    return out


def _lean_rope(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own forward, but for the function that it finds under the name `ROPE`."""
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, FunctionType) or ROPE not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get(ROPE)
    head_dim, weight = getattr(module, "head_dim", None), next(module.parameters(), None)
    if plain is None or weight is None or not isinstance(head_dim, int) or head_dim % 2:
        return None
    for dtype in {weight.dtype, torch.float32}:
        like = weight.to(dtype)[:0]
        q, k = (_numbers(7, heads, head_dim, like=like).transpose(0, 1)[None] for heads in (3, 2))
        cos, sin = _numbers(2, 1, 7, head_dim, like=like)
        if not all(map(_agree, _fused().rotate(q, k, cos, sin), plain(q, k, cos, sin))):
            return None
    namespace = {**forward.__globals__, ROPE: functools.partial(_rope, plain)}
    copy = FunctionType(forward.__code__, namespace, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(copy, module)


def _rope(plain: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    if len(tensors) != 4 or how or not _fused().can_rotate(*tensors):  # for example where part of a head is turned
        return plain(*tensors, **how)
    rotated: tuple[Tensor, Tensor] = _fused().rotate(*tensors)
    return rotated


def _numbers(*shape: int, like: Tensor) -> Tensor:
    """The same normal numbers each time, so that what is replaced does not change from run to run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results are the same, to a few roundings."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    exact = theirs.double()
    size = exact.abs() + exact.square().mean(-1, keepdim=True).sqrt()
    tolerance = max(ROUNDINGS * torch.finfo(ours.dtype).eps, 1e-5)  # in float32, sums in another order differ by more
    return bool(((ours.double() - exact).abs() <= tolerance * size).all())
