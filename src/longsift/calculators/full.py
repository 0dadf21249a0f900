"""The full calculator: queries and keys of every global layer of a causal language model, in one forward."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from longsift.attention import causal_attention
from longsift.calculators import LayerAttention
from longsift.calculators.checkpoint import SINGLE, Checkpoint, Location, locate
from longsift.calculators.interface import (
    BACKEND,
    Enough,
    Seen,
    build_unallocated,
    check_ids,
    choose_dtype,
    described,
    keep_layers,
    quiet,
    read_config,
    run,
)
from longsift.calculators.lean import make_lean
from longsift.calculators.positions import remember_state
from longsift.calculators.recorded import Recorder
from longsift.calculators.steady import steady_activations
from longsift.errors import ModelError, UnsupportedModel, UsageError

T = TypeVar("T")


class FullModel:
    """Queries and keys of a model's layers, as one forward makes them. Make it with `FullModel.load`.

    Attributes:
        vocab_size: token ids are below this.
        max_length: the longest window that the model's configuration states, in tokens; None when it states none.
            Longer windows are computed all the same.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Any,
        location: Location,
        device: torch.device,
        layers: tuple[int, ...] | None,
        rope_theta: float | None = None,
        fused: Sequence[str] = (),
    ) -> None:
        self.vocab_size = int(config.vocab_size)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._network, self._config, self._location, self._device = network, config, location, device
        self._recorder = Recorder(device) if device.type == "cuda" else None
        self._layers, self._rope_theta, self._fused = layers, rope_theta, list(fused)
        self._restore = remember_state(network)  # what a window gives must not depend on those before it
        probe: dict[int, Seen] = {}

        def look(seen: Seen) -> torch.Tensor:
            probe[seen.attention.layer] = seen
            return attention_output(seen)

        run(network, torch.zeros(1, 2, dtype=torch.int64, device=device), look)
        if sorted(probe) != list(range(config.num_hidden_layers)):
            raise UnsupportedModel(
                f"Of the {config.num_hidden_layers} layers of {location.name} ('{config.model_type}') only "
                f"{sorted(probe)} have an attention that can be observed. Use another model."
            )
        self._windows = {layer: probe[layer].attention.sliding_window for layer in sorted(probe)}
        first = probe[0].attention
        self._dtype = first.q.dtype
        self._shape = {"heads": first.q.shape[1], "kv_heads": first.k.shape[1], "head_dim": first.q.shape[-1]}

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        layers: Sequence[int] | None = None,
        rope_theta: float | None = None,
        trust_remote_code: bool = False,
    ) -> FullModel:
        """Read a model, up to the last layer that is wanted.

        Args:
            model: "embedded", a folder, a `.safetensors` file or a hub id, as `checkpoint.locate` takes them.
            revision: branch, tag or commit of a hub model.
            device: where the model runs.
            dtype: the type it runs in; by default float32 on a CPU and the checkpoint's type elsewhere.
            layers: the layers to measure, counted from 0; by default every layer that sees the whole window.
            rope_theta: another RoPE base; the rest of the RoPE settings stays.
            trust_remote_code: let transformers run code that comes with the checkpoint.

        Raises:
            ModelError: the checkpoint cannot be found or read.
            UnsupportedModel: an architecture whose attention cannot be measured faithfully.
            UsageError: `layers` that the model does not have; `rope_theta` for a model without RoPE.
        """
        location = locate(model, revision)
        target = torch.device(device)
        config = read_config(location, trust_remote_code=trust_remote_code, rope_theta=rope_theta)
        wanted = None if layers is None else existing_layers(layers, config, location)
        config = keep_layers(config, config.num_hidden_layers if wanted is None else wanted[-1] + 1)
        # Refuses what cannot be measured before any weights are fetched.
        plan = build_unallocated(config, choose_dtype(config, target, dtype), trust_remote_code=trust_remote_code)
        network = _load_network(location.downloaded(), plan).to(target)
        if target.type == "cpu":  # which computes what the network as it is would in one thread, bit for bit
            steady_activations(network)
        fused = make_lean(network) if target.type == "cuda" else []
        return cls(network, config, location, target, wanted, rope_theta, fused)

    def global_layers(self, length: int) -> tuple[int, ...]:
        """The layers that are measured in a window of `length` tokens: those whose every query sees its whole past.

        Raises:
            ModelError: there is none, or a layer that was asked for by number sees less.
        """
        seeing = tuple(layer for layer, window in self._windows.items() if window is None or window >= length)
        if self._layers is not None and (short := sorted(set(self._layers) - set(seeing))):
            raise ModelError(
                f"--layers names {short} of {self._location.name}, which see only a sliding window of "
                f"{self._windows[short[0]]} tokens in a window of {length}. Its global layers are {list(seeing)}."
            )
        if not seeing:
            raise ModelError(
                f"No layer of {self._location.name} sees the whole of a window of {length} tokens. Use shorter "
                "windows or another model."
            )
        return self._layers if self._layers is not None else seeing

    def reduce(
        self,
        input_ids: torch.Tensor,
        reduction: Callable[[LayerAttention], T],
        layers: Sequence[int] | None = None,
        *,
        and_attend: Callable[[LayerAttention, torch.Tensor], tuple[T, torch.Tensor]] | None = None,
    ) -> dict[int, T]:
        """Run whole windows through the model and reduce each measured layer's queries and keys as they are made.

        The forward ends at the last measured layer's queries and keys; no cache, no logits.

        Args:
            input_ids: (batch, length) token ids.
            reduction: from a layer's queries and keys to what is kept of them; it must not keep these themselves if
                memory matters.
            layers: measure only these of the global layers, and stop at the last of them.
            and_attend: from a layer's queries and keys, and its values (batch, kv_heads, length, ·), to what
                `reduction` gives and the layer's output, (batch, heads, length, ·): for a reduction that has the
                probabilities at hand anyway. The last layer, whose output nobody needs, goes without.

        Returns:
            What `reduction` gave, by layer.

        Raises:
            ModelError: an id outside the vocabulary, or no layer to measure (see `global_layers`).
        """
        ids = check_ids(input_ids, self.vocab_size, self._device)
        measured = set(self.global_layers(ids.shape[1]))
        if layers is not None:
            if not layers or not measured.issuperset(layers):
                raise ModelError(
                    f"Layers {sorted(layers)} of {self._location.name} are to be measured in a window of "
                    f"{ids.shape[1]} tokens, and those that see all of it are {sorted(measured)}."
                )
            measured = set(layers)
        results: dict[int, T] = {}

        def observer(seen: Seen) -> torch.Tensor:
            layer = seen.attention.layer
            last = len(measured - results.keys()) == 1
            if layer in measured and and_attend is not None and not last:
                results[layer], output = and_attend(seen.attention, seen.value)
                return output
            if layer in measured:
                results[layer] = reduction(seen.attention)
                if last:
                    raise Enough
            return attention_output(seen)

        self._restore()
        run(self._network, ids, observer)
        return results

    def each_window(
        self, input_ids: torch.Tensor, compute: Callable[[torch.Tensor], dict[str, torch.Tensor]], key: Hashable
    ) -> dict[str, torch.Tensor]:
        """Apply `compute` to each window of a batch by itself: a forward of several would give other bits.

        On a GPU its operations may be recorded and replayed, without another call, for later windows of the length.

        Args:
            input_ids: (batch, length) token ids.
            compute: from a window, (1, length), to new tensors that depend on nothing but its ids and its length.
            key: equal only for what computes the same.

        Returns:
            The tensors of all windows by name, the windows being the first dimension; on the model's device.
        """
        ids = check_ids(input_ids, self.vocab_size, self._device)
        windows = [ids[i : i + 1] for i in range(len(ids))]
        if self._recorder is None:
            measured = [compute(window) for window in windows]
        else:
            measured = [self._recorder.run(key, compute, window) for window in windows]
        return {name: torch.stack([columns[name] for columns in measured]) for name in measured[0]}

    def identity(self) -> dict[str, Any]:
        """What tells this calculator from others, wherever it lies: its weights, and the RoPE base if overridden."""
        return {
            "name": self._location.name,
            "revision": self._location.revision,
            "fingerprint": Checkpoint(self._location.downloaded()).fingerprint(),
            "rope_theta": self._rope_theta,
        }

    def describe(self) -> dict[str, Any]:
        """What a manifest records of this calculator, as plain values."""
        return {
            **described("full", self._location, self._config, self._dtype, self._device),
            **self._shape,
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "layers": None if self._layers is None else list(self._layers),
            "sliding_windows": list(self._windows.values()),
            "fused": self._fused,
        }


def existing_layers(layers: Sequence[int], config: Any, location: Location) -> tuple[int, ...]:
    """Layers by index, in order and each once.

    Raises:
        UsageError: none, or one that the model of this configuration does not have.
    """
    wanted, total = tuple(sorted(set(layers))), int(config.num_hidden_layers)
    if not wanted or wanted[0] < 0 or wanted[-1] >= total:
        raise UsageError(f"--layers {list(layers)}: {location.name} has the layers 0 to {total - 1}.")
    return wanted


def attention_output(seen: Seen) -> torch.Tensor:
    """What the layer goes on with: its attention applied to its values, (batch, heads, length, head_dim)."""
    attention = seen.attention
    return causal_attention(
        attention.q,
        attention.k,
        seen.value,
        scale=attention.scale,
        softcap=attention.softcap,
        sliding_window=attention.sliding_window,
    )


def _load_network(location: Location, plan: Any) -> nn.Module:
    """The network that `plan` is without its weights, with them, in the type that it was planned in."""
    # A language model saved as part of a larger one has its tensors under a prefix that the library does not
    # expect. There is no such prefix where it must convert tensors, as for experts; these names it knows.
    prefix = Checkpoint(location).prefix_of([name for name, _ in plan.named_parameters()])
    foreign = prefix is not None and prefix not in ("", f"{plan.base_model_prefix}.")
    named = location.weights == SINGLE or location.weights.endswith(".json")
    try:
        with quiet():
            network, info = type(plan).from_pretrained(
                location.folder if named else None,
                state_dict=None if named else load_file(f"{location.folder}/{location.weights}"),
                config=plan.config,
                key_mapping={f"^{re.escape(prefix or '')}": ""} if foreign else None,
                dtype=plan.dtype,
                attn_implementation=BACKEND,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"The weights of {location.name} cannot be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{location.name} lacks {len(missing)} tensors of the model that its config.json describes, for "
            f"example '{missing[0]}'. Use a checkpoint saved by transformers for this very model."
        )
    loaded: nn.Module = network.eval()
    return loaded.requires_grad_(False)
