"""What the calculators share: the model's configuration, and the place where its queries and keys are seen.

transformers lets every model that supports "attention backends" call a registered function in place of its
attention. That function, here `_attend`, hands the queries and keys of each layer to whoever observes the forward;
so no code of any one architecture is copied, and what is measured is what the model itself computes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from longsift.calculators import LayerAttention
from longsift.calculators.checkpoint import Location
from longsift.errors import ModelError, UnsupportedModel, UsageError

BACKEND = "longsift"  # must not look like one of the library's own kernels nor like a hub id

# Arguments of an attention function that say nothing about the probabilities in whole, unpadded, uncached windows.
_HARMLESS = {
    "cache_position",
    "dropout",
    "layer_idx",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}


class Enough(Exception):
    """Ends a forward at the point from which nothing more is needed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer's call of the attention: `attention` to measure, `value` (batch, kv_heads, length, ·) to go on with."""

    attention: LayerAttention
    value: torch.Tensor


Observer = Callable[[Seen], torch.Tensor]
_observer: ContextVar[Observer] = ContextVar("observer")


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the block, every attention layer calls `observer`, which gives (batch, heads, length, ·) or ends it."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def run(network: nn.Module, input_ids: torch.Tensor, observer: Observer) -> None:
    """One forward of `network` over whole windows, (batch, length), up to its end or to `Enough`."""
    # Without a mask of tokens, the library looks for several sequences in one row, and waits for the GPU to see none.
    every = torch.ones(input_ids.shape, dtype=torch.bool, device=input_ids.device)
    with observed(observer):
        try:
            network(input_ids=input_ids, attention_mask=every, use_cache=False)
        except Enough:
            return


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if is_causal is False or getattr(module, "is_causal", True) is False:
        _refuse(module, "attends to future tokens")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        _refuse(module, "does not number its attention layers")
    for name, given in others.items():
        if given is not None and name not in _HARMLESS:
            _refuse(module, f"passes '{name}' to its attention, which changes the probabilities in an unknown way")
    window = sliding_window if sliding_window is not None and sliding_window < query.shape[2] else None
    masked = None if attention_mask is None else _window_of(module, attention_mask)
    if masked != window:
        _refuse(module, f"masks a window of {masked} tokens but names one of {window} (None: the whole past)")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = _observer.get()(Seen(LayerAttention(layer, query, key, scale, softcap, sliding_window), value))
    return out.transpose(1, 2).contiguous(), None


def _mask(
    *,
    kv_length: int,
    mask_function: Callable[..., Any],
    use_vmap: bool = False,
    config: Any = None,
    **_: Any,
) -> torch.Tensor | None:
    """In place of an L×L mask: None for the causal mask, or the width of a causal sliding window.

    The model asks for a mask by the rule of which pairs may attend. The rule is tried on two rows of the map; one that
    is neither of the two is refused, since a mask that is silently left out would make wrong probabilities.
    """
    # A rule that holds no values of its own, as the library's causal one, says the same at every forward.
    constant = isinstance(mask_function, FunctionType) and mask_function.__closure__ is None
    width = None if use_vmap else (_constant_width if constant else _width)(mask_function, kv_length)
    if width is None:
        _refuse(config, "masks more than the future and what lies outside a sliding window")
    return None if width == kv_length else torch.tensor([width])


def _width(mask_function: Callable[..., Any], length: int) -> int | None:
    """How many keys a query sees under a causal, perhaps sliding, rule for `length` keys; None for any other rule."""
    zero, keys = torch.tensor(0), torch.arange(length)
    queries = torch.tensor([[length // 2], [length - 1]])
    seen = torch.as_tensor(mask_function(zero, zero, queries, keys)).expand(2, length)
    widths = seen.sum(-1, keepdim=True)
    middle, last = widths.flatten().tolist()
    sliding = middle == min(last, length // 2 + 1) and torch.equal(seen, (keys <= queries) & (keys > queries - widths))
    return int(last) if sliding else None


_constant_width = functools.lru_cache(maxsize=64)(_width)


def _window_of(module: nn.Module, mask: torch.Tensor) -> int:
    if mask.shape != (1,) or mask.dtype != torch.int64:
        _refuse(module, f"makes an attention mask of its own, of shape {tuple(mask.shape)}")
    return int(mask)


AttentionInterface.register(BACKEND, _attend)
AttentionMaskInterface.register(BACKEND, _mask)


def _refuse(owner: Any, what: str) -> NoReturn:
    config = getattr(owner, "config", owner)
    raise UnsupportedModel(
        f"The architecture '{getattr(config, 'model_type', type(owner).__name__)}' {what}, so its attention cannot be "
        "measured faithfully. Use another model with --model, for example a Llama, Qwen, Mistral, Gemma or OLMo."
    )


def read_config(location: Location, *, trust_remote_code: bool, rope_theta: float | None = None) -> Any:
    """The configuration of the language model at `location`, its RoPE base replaced by `rope_theta` when given.

    Raises:
        ModelError: the configuration cannot be read, or wants code that is not trusted.
        UnsupportedModel: an architecture or a quantisation that cannot be measured.
        UsageError: `rope_theta` for a model without RoPE.
    """
    try:
        with quiet():
            whole = AutoConfig.from_pretrained(
                location.pretrained, revision=location.revision or "main", trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"The configuration of {location.name} cannot be read: {error} If it wants its own code, look at that code "
            "and then pass --trust-remote-code."
        ) from error
    config = copy.deepcopy(whole.get_text_config(decoder=True))
    if getattr(config, "dtype", None) is None:  # a language model within a larger one may leave it to that
        config.dtype = getattr(whole, "dtype", None)
    if getattr(config, "is_encoder_decoder", False):
        _refuse(config, "is an encoder with a decoder")
    if any(getattr(part, "quantization_config", None) is not None for part in (whole, config)):
        raise UnsupportedModel(
            f"{location.name} is quantised, so its queries and keys are not those of the model it was made from. "
            "Use the unquantised checkpoint."
        )
    if rope_theta is not None:
        _set_rope_theta(config, rope_theta, location.name)
    return config


def rope_of(config: Any) -> dict[str, Any] | None:
    """The RoPE parameters of `config` as one plain dictionary, whichever way its transformers version keeps them."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is not None:
        return dict(parameters)
    theta = getattr(config, "rope_theta", None)
    return None if theta is None else {**(getattr(config, "rope_scaling", None) or {}), "rope_theta": theta}


def described(kind: str, location: Location, config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What a manifest records of any calculator, as plain values."""
    return {
        "kind": kind,
        "model": location.name,
        "revision": location.revision,
        "architecture": config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "rope": rope_of(config),
    }


def _set_rope_theta(config: Any, theta: float, name: str) -> None:
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:  # transformers 4
        if not hasattr(config, "rope_theta"):
            raise UsageError(f"{name} has no RoPE, so --rope-theta does not apply to it.")
        config.rope_theta = theta
    elif "rope_theta" in parameters:
        config.rope_parameters = {**parameters, "rope_theta": theta}
    elif "full_attention" in parameters:  # one set a layer type: the sliding layers keep theirs
        full = {**parameters["full_attention"], "rope_theta": theta}
        config.rope_parameters = {**parameters, "full_attention": full}
    else:
        raise UsageError(f"{name} keeps its RoPE base in an unknown place, so --rope-theta does not apply to it.")


def keep_layers(config: Any, layers: int) -> Any:
    """A copy of `config` for the model's first `layers` decoder layers; lists with one entry a layer are cut with it.

    Raises:
        UnsupportedModel: one of these layers is neither full nor sliding-window attention.
    """
    total = config.num_hidden_layers
    kept = copy.deepcopy(config)
    kept.num_hidden_layers = layers
    for name, entries in list(vars(kept).items()):
        if isinstance(entries, list) and len(entries) == total:
            setattr(kept, name, entries[:layers])
    for kind in getattr(kept, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            _refuse(kept, f"has layers of the type '{kind}'")
    return kept


class _Unallocated(TorchFunctionMode):
    """Puts what `torch.empty` makes, the weights of a new module, on the meta device; computed buffers stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_unallocated(config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> nn.Module:
    """The decoder of `config` without its weights (they lie on the meta device) and with its real buffers.

    Raises:
        UnsupportedModel: the architecture does not let its attention be observed.
    """
    try:
        with quiet(), _Unallocated():
            network: nn.Module = AutoModel.from_config(
                config, dtype=dtype, attn_implementation=BACKEND, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"transformers cannot build the architecture '{config.model_type}' with an attention of ours "
            f"({type(error).__name__}: {error}). Use another model with --model."
        ) from error
    if not getattr(network, "_supports_attention_backend", False):
        _refuse(network, "does not let its attention be observed (no attention backend in transformers)")
    return network.eval()


def choose_dtype(config: Any, device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype` when given; else float32 on a CPU and the checkpoint's own elsewhere."""
    if dtype is not None:
        return dtype
    stored = getattr(config, "dtype", None)
    return torch.float32 if device.type == "cpu" or not isinstance(stored, torch.dtype) else stored


def check_ids(input_ids: torch.Tensor, vocab_size: int, device: torch.device) -> torch.Tensor:
    """`input_ids` on `device`, when they are what a model of that vocabulary can read.

    Ids that lie on a GPU are taken as they are, since looking at them would wait for it: check them before.

    Raises:
        ModelError: not (batch, length) integers with a token at least, or an id outside the vocabulary.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ModelError(
            f"Token ids must be integers of shape (batch, length), not {input_ids.dtype} {tuple(input_ids.shape)}."
        )
    if input_ids.device.type == "cpu":
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            worst = low if low < 0 else high
            raise ModelError(
                f"Token id {worst} is outside the model's vocabulary of {vocab_size}. "
                "Tokenise with the tokenizer of the model that scores."
            )
    return input_ids.to(device=device, dtype=torch.int64)


@contextmanager
def quiet() -> Iterator[None]:
    """Hush the model library's advice and progress bars, which are for people who generate text."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
