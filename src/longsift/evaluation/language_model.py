"""A calculator as a language model: the probabilities of its next tokens, over long windows.

Windows are read a chunk at a time into the model's own cache. So neither the logits of a window nor a mask over all
pairs of its tokens is ever held, and layers with a sliding window keep no more than that window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from longsift.calculators.checkpoint import SINGLE, locate
from longsift.calculators.interface import check_ids, choose_dtype, quiet, read_config
from longsift.errors import ModelError
from longsift.options import MeterOptions, ModelOptions
from longsift.scoring import resolve_device, resolve_dtype

CHUNK = 1024  # tokens read at a time


class LanguageModel:
    """A causal language model with its output layer.

    Args:
        model: as for scoring: "embedded", a folder, a `.safetensors` file or a hub id.
        options: where and how it runs.

    Raises:
        ModelError: it cannot be found or loaded, or has no output layer.
    """

    def __init__(self, model: ModelOptions = ModelOptions(), options: MeterOptions = MeterOptions()) -> None:
        location = locate(model.model or "embedded", model.revision)
        device = resolve_device(options.device)
        config = read_config(location, trust_remote_code=model.trust_remote_code, rope_theta=options.rope_theta)
        local = location.downloaded()
        named = local.weights == SINGLE or local.weights.endswith(".json")
        # Some versions of transformers leave a soft cap out of PyTorch's own attention without a word.
        attention = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"
        try:
            with quiet():
                network, info = AutoModelForCausalLM.from_pretrained(
                    local.folder if named else None,
                    state_dict=None if named else load_file(f"{local.folder}/{local.weights}"),
                    config=config,
                    dtype=choose_dtype(config, device, resolve_dtype(options.dtype)),
                    attn_implementation=attention,
                    use_safetensors=True,
                    trust_remote_code=model.trust_remote_code,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{location.name} cannot be loaded as a language model: {error}") from error
        if info["missing_keys"]:
            raise ModelError(
                f"{location.name} lacks {len(info['missing_keys'])} tensors of a causal language model, for example "
                f"'{sorted(info['missing_keys'])[0]}'. Needles and perplexity need its output layer too."
            )
        self.name = location.name
        self.device = device
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._config = config
        self._vocab_size = int(config.vocab_size)
        self._network: nn.Module = network.to(device).eval().requires_grad_(False)

    def losses(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of every token but the first, in nats.

        Args:
            input_ids: (length,), at least 2.

        Returns:
            (length - 1,), float32, on the CPU.

        Raises:
            ModelError: an id outside the vocabulary.
        """
        ids = check_ids(input_ids[None], self._vocab_size, self.device)
        parts = []
        with torch.inference_mode():
            for start, logits, _ in self._read(ids[:, :-1], all_logits=True):
                targets = ids[0, start + 1 : start + 1 + logits.shape[1]]
                parts.append(nn.functional.cross_entropy(logits[0].float(), targets, reduction="none").cpu())
        return torch.cat(parts)

    def continuations(self, context: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How likely each candidate is after one context, which is read once.

        Args:
            context: (length,) token ids.
            candidates: (n, k) token ids, each row one continuation.

        Returns:
            The log-likelihood of each, (n,), and whether each of its tokens is the most likely one, (n,): whether
            greedy decoding writes it. On the CPU.

        Raises:
            ModelError: an id outside the vocabulary.
        """
        ids = check_ids(context[None], self._vocab_size, self.device)
        candidates = check_ids(candidates, self._vocab_size, self.device)
        n, size = candidates.shape
        with torch.inference_mode():
            for _, logits, cache in self._read(ids, all_logits=False):
                first, past = logits[:, -1:], cache
            logits = first.expand(n, -1, -1)
            if size > 1:
                # All candidates but their last tokens one after another, each of which sees the context and its own.
                places = ids.shape[1] + torch.arange(size - 1, device=self.device)
                rest = self._network(
                    input_ids=candidates[:, :-1].reshape(1, -1),
                    past_key_values=past,
                    position_ids=places.repeat(n)[None],
                    attention_mask=self._side_by_side(past, n, size - 1, first.dtype),
                    use_cache=True,
                ).logits
                logits = torch.cat([logits, rest.reshape(n, size - 1, -1)], dim=1)
            likely = logits.float().log_softmax(-1)
            given = likely.gather(-1, candidates[..., None])[..., 0].sum(-1)
            greedy = (likely.argmax(-1) == candidates).all(-1)
        return given.cpu(), greedy.cpu()

    def _side_by_side(self, cache: Any, n: int, size: int, dtype: torch.dtype) -> Any:
        """The mask of n runs of `size` tokens after a cached context: one, or one a type where layers differ."""
        row = torch.arange(n * size, device=self.device)
        own = (row[:, None] // size == row // size) & (row[:, None] >= row)
        kinds = getattr(self._config, "layer_types", None) or ["full_attention"] * len(cache.layers)
        masks: dict[str, torch.Tensor] = {}
        for kind, layer in zip(kinds, cache.layers, strict=True):
            if kind in masks:
                continue
            kept = layer.keys.shape[2]  # the last tokens of the context
            window = layer.sliding_window if layer.is_sliding else None
            gap = row[:, None] % size + torch.arange(kept, 0, -1, device=self.device)
            seen = torch.cat([gap < (window or kept + size + 1), own], dim=1)
            mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
            masks[kind] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
        return masks if len(masks) > 1 else masks[kinds[0]]

    def _read(self, ids: torch.Tensor, *, all_logits: bool) -> Iterator[tuple[int, torch.Tensor, Any]]:
        """Read (1, length) ids chunk by chunk: each chunk's start, its logits (or its last one's), and the cache."""
        past = None
        for start in range(0, ids.shape[1], CHUNK):
            chunk = ids[:, start : start + CHUNK]
            places = torch.arange(start, start + chunk.shape[1], device=self.device)[None]
            out = self._network(
                input_ids=chunk,
                past_key_values=past,
                position_ids=places,
                use_cache=True,
                logits_to_keep=0 if all_logits else 1,
            )
            past = out.past_key_values
            yield start, out.logits, past
