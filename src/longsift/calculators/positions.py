"""The position embeddings that an attention layer is given: read, or put out of action.

The layers of transformers are given cosines and sines, and turn queries and keys by them. Nothing here knows an
architecture: what looks like such a pair is taken for it, and the first-layer calculator checks what it makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from longsift.calculators.interface import Enough
from longsift.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Turns:
    """By how much RoPE turns each pair of numbers of a head at each position.

    Numbers i and i + pairs of a head are a pair, for i < pairs; the numbers from 2·pairs on are not turned.

    Attributes:
        cos: cosines of the angles, times the factor that YaRN puts in, (length, pairs).
        sin: sines, likewise.
    """

    cos: Tensor
    sin: Tensor


@contextmanager
def unturned(attention: nn.Module) -> Iterator[None]:
    """Within the block, the layer's RoPE turns nothing: its cosines are 1 and its sines 0."""

    def still(value: Any) -> Any:
        return (torch.ones_like(value[0]), torch.zeros_like(value[1])) if _is_pair(value) else value

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(map(still, args)), {name: still(value) for name, value in kwargs.items()}

    handle = attention.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def read_turns(attention: nn.Module, forward: Callable[[], None], length: int, *, masked: bool) -> Turns | None:
    """What turns queries and keys of `length` positions; None where it cannot be told or there is nothing.

    Args:
        attention: the module of the layer's attention.
        forward: a forward over one window; it ends in `Enough` as soon as it comes to the attention.
        masked: whether the layer masks more than the future in a window of this length.

    Raises:
        UnsupportedModel: the layer masks it otherwise than `masked` says.
    """
    given: list[Any] = []
    masks: list[Any] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.extend((*args, *kwargs.values()))
        masks.append(kwargs.get("attention_mask"))
        raise Enough

    handle = attention.register_forward_pre_hook(take, with_kwargs=True)
    try:
        forward()
    finally:
        handle.remove()
    if (masks[0] is not None) != masked:
        raise UnsupportedModel(
            f"The first layer of the model masks windows of {length} tokens in another way than others. "
            "Use another model, or --method ladm."
        )
    pair = next((value for value in given if _is_pair(value)), None)
    if pair is None or pair[0].shape[:-1].numel() != length or pair[0].shape[-1] % 2:
        return None
    cos, sin = (half.reshape(length, 2, -1) for half in pair)
    if not torch.equal(cos[:, 0], cos[:, 1]) or not torch.equal(sin[:, 0], sin[:, 1]):
        return None  # pairs of neighbours, perhaps
    return Turns(cos[:, 0].contiguous(), sin[:, 0].contiguous())


def remember_state(network: nn.Module) -> Callable[[], None]:
    """What puts the modules without parameters, RoPE among them, back into the state that they are in now.

    RoPE that grows with the window ("dynamic") keeps what the longest one so far needed, so that what a window gives
    would depend on those before it.
    """
    modules = [module for module in network.modules() if not any(True for _ in module.parameters())]
    states = [(module, dict(vars(module)), dict(module.named_buffers(recurse=False))) for module in modules]

    def restore() -> None:
        for module, attributes, buffers in states:
            vars(module).update(attributes)
            for name, buffer in buffers.items():
                setattr(module, name, buffer)

    return restore


def _is_pair(value: Any) -> TypeGuard[tuple[Tensor, Tensor]]:
    return (
        type(value) in (tuple, list)
        and len(value) == 2
        and all(isinstance(half, Tensor) and half.is_floating_point() and half.ndim >= 2 for half in value)
        and value[0].shape == value[1].shape
    )
