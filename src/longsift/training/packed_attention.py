"""Attention that stays inside a document, by the fastest kernel that the device has.

transformers finds packed documents by their positions, which begin anew with each, and masks every other document.
With `sdpa` that mask is a map of window × window; FlexAttention keeps one number a block of 128 × 128.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask
from transformers.utils import is_flash_attn_2_available

from longsift.errors import UnsupportedModel, UsageError

log = logging.getLogger(__name__)

FLEX = "longsift_blocks"  # must not look like one of the library's own kernels nor like a hub id
_MAP_TOKENS = 8192  # windows up to these tokens can be masked by a map without a warning


def _flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Under autocast, norms of queries and keys give float32 and the values' projection bfloat16.
    result: tuple[torch.Tensor, torch.Tensor | None] = flex_attention_forward(
        module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **others
    )
    return result


AttentionInterface.register(FLEX, _flex)
AttentionMaskInterface.register(FLEX, flex_attention_mask)


def choose_attention(wanted: str, device: torch.device, config: Any, window: int, device_batch: int) -> str:
    """The name under which transformers knows the attention to train with.

    Args:
        wanted: "auto", "flex", "flash" or "sdpa".
        config: of the model; its soft cap rules kernels out.

    Raises:
        UsageError: this device or this model cannot have the one that is wanted.
    """
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    plain = "eager" if softcap else "sdpa"  # transformers' sdpa leaves soft caps out
    if wanted == "sdpa" and softcap:
        raise UsageError(f"--attention sdpa cannot apply the soft cap of '{config.model_type}'. Leave it out.")
    if wanted == "flex" or (wanted == "auto" and _has_flex(device)):
        if not _has_flex(device):
            raise UsageError("--attention flex needs a CUDA device of compute capability 8.0 and torch>=2.6.")
        return FLEX
    if wanted == "flash" or (wanted == "auto" and _has_flash(device) and device_batch == 1):
        if not _has_flash(device):
            raise UsageError("--attention flash needs a CUDA device and `pip install flash-attn`.")
        if device_batch > 1:
            raise UsageError("--attention flash keeps documents apart only with --device-batch 1.")
        return "flash_attention_2"
    if window > _MAP_TOKENS:
        log.warning(
            "documents are kept apart by a map of %d × %d values; FlexAttention needs none, on a GPU with torch>=2.6",
            window,
            window,
        )
    return plain


def _has_flex(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and Version(torch.__version__) >= Version("2.6")
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda" and bool(is_flash_attn_2_available())


def check_documents_apart(model: Any) -> None:
    """Try on a few tokens that what stands in one packed document changes nothing in the next.

    The architecture decides that (whether it hands positions to its masks, and has no layer that mixes neighbours),
    not the kernel.

    Raises:
        UnsupportedModel: it changes something.
    """
    length, vocab = 12, model.config.vocab_size
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocab, (3, length), generator=generator)
    ids = torch.stack((torch.cat((first, second)), torch.cat((other, second)))).to(device)
    positions = torch.arange(length, device=device).repeat(2).expand(2, -1)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, length:].float()
    if (logits[0] - logits[1]).abs().max() > 1e-5 * logits.abs().max():
        raise UnsupportedModel(
            f"The architecture '{model.config.model_type}' lets packed documents see each other, so it cannot be "
            "trained on them. Use a plain attention model, such as a Llama, Qwen, Mistral, Gemma or OLMo."
        )
