"""A leaner network for a GPU: norms, gated MLPs and RoPE that take one pass over memory in place of five to ten.

Between matrix products, transformers runs one small kernel an operation, which on a GPU costs a third of the time
that the attention of a 32,768-token window does. Parts of a network are replaced one by one, on the loaded instance
alone, and by what they compute: whatever its architecture, a part is replaced when, on inputs made for the purpose,
its replacement gives the same numbers to a few roundings of their type.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import FunctionType
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
    found = dict.fromkeys(parts, False)
    for module in network.modules():
        if "forward" in vars(module):  # someone else's, on this very module
            continue
        for name, lean in parts.items():
            forward = lean(module)
            if forward is not None:
                # The module's own class but for `forward`; a function on the module itself would be a cycle of
                # references, which keeps the weights on the GPU after their last use.
                module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})
                found[name] = True
    return [name for name in parts if found[name]]


def _fused() -> Any:
    return importlib.import_module("longsift.calculators.fused")


def _lean_norm(module: nn.Module) -> Callable[..., Tensor] | None:
    plain, weight = type(module).forward, getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    if len(list(module.parameters())) > 1 or len(weight) > _fused().LARGEST_ROW:
        return None
    # Rows from small to large, so that another eps shows, and off zero, so that a mean taken away does.
    x = (_numbers(12, len(weight), like=weight) + 1) * torch.logspace(-3, 1, 12).to(weight)[:, None]

    def norm(offset: float) -> Callable[[Any, Tensor], Tensor]:
        def forward(self: Any, x: Tensor, *others: Any, **how: Any) -> Tensor:
            if others or how or x.shape[-1] != len(self.weight) or not _fused().is_dense(x):
                out: Tensor = plain(self, x, *others, **how)
            else:
                out = _fused().rms_norm(x, self.weight, eps, offset)
            return out

        return forward

    for forward in (norm(0.0), norm(1.0)):
        if all(_agree(forward(module, each), _result(plain, module, each)) for each in (x, x.float())):
            return forward
    return None


def _lean_mlp(module: nn.Module) -> Callable[..., Tensor] | None:
    plain = type(module).forward
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    activation = getattr(module, "act_fn", None)
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and activation):
        return None
    x = _numbers(16, gate.in_features, like=gate.weight)
    grid = torch.linspace(-12, 12, 4097, device=x.device)
    for kind in get_args(_fused().Gate):
        # In half precision alone, GELU by its tanh formula could pass for the exact one.
        if _agree(_fused().gate_(grid.clone(), torch.ones_like(grid), kind), _result(activation, grid)):
            break
    else:
        return None

    def forward(self: Any, x: Tensor, *others: Any, **how: Any) -> Tensor:
        if others or how:
            out: Tensor = plain(self, x, *others, **how)
        else:
            out = self.down_proj(_fused().gate_(self.gate_proj(x), self.up_proj(x), kind))
        return out

    return forward if _agree(forward(module, x), _result(plain, module, x)) else None


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
        theirs = _result(plain, q, k, cos, sin)
        if not isinstance(theirs, tuple) or not all(map(_agree, _fused().rotate(q, k, cos, sin), theirs)):
            return None

    def rope(*tensors: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        if len(tensors) != 4 or how or not _fused().can_rotate(*tensors):  # such as where part of a head is turned
            rotated: tuple[Tensor, Tensor] = plain(*tensors, **how)
        else:
            rotated = _fused().rotate(*tensors)
        return rotated

    namespace = {**forward.__globals__, ROPE: rope}
    lean = FunctionType(forward.__code__, namespace, forward.__name__, forward.__defaults__, forward.__closure__)
    lean.__kwdefaults__ = forward.__kwdefaults__
    return lean


def _numbers(*shape: int, like: Tensor) -> Tensor:
    """The same normal numbers each time, so that what is replaced does not change from run to run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def _result(function: Callable[..., Any], *inputs: Any) -> Any:
    """What the function gives; None where it takes other inputs than these."""
    try:
        return function(*inputs)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None


def _agree(ours: Tensor, theirs: Any) -> bool:
    """Whether two results are the same, to a few roundings."""
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    exact = theirs.double()
    size = exact.abs() + exact.square().mean(-1, keepdim=True).sqrt()
    tolerance = max(ROUNDINGS * torch.finfo(ours.dtype).eps, 1e-5)  # in float32, sums in another order differ by more
    return bool(((ours.double() - exact).abs() <= tolerance * size).all())
