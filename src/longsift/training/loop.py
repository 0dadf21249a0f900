"""The training loop: a recipe, its schedule, and steps on one device or on several of one host."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from longsift.errors import OutputError, UsageError
from longsift.tables import publish
from longsift.training.corpus import Packed
from longsift.training.facts import Facts
from longsift.training.model import compiled_losses, load_model, new_model, save_model, token_losses
from longsift.training.muon import Muon
from longsift.training.sampling import WindowSampler

# Degenerate and patched-together text should not surprise the model, but it should not spend itself on it.
WEIGHTS = {"concat": 0.5, "noise": 0.25}
LOG_EVERY = 20  # steps


def learning_rate(step: int, progress: float, warmup: int, decay: float) -> float:
    """Factor of the peak rate: linear warm-up, a plateau, then linear to zero over the last `decay` of the run.

    Args:
        step: steps done, for the warm-up.
        progress: share of the run that is done, in [0, 1).
        warmup: steps until the peak rate.
        decay: share of the run in which the rate falls.
    """
    return min((step + 1) / warmup, 1.0, (1 - progress) / decay)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained; the defaults, but for time and shares, are the shipped one's.

    Attributes:
        stages: (window length in tokens, steps) in order; with `minutes`, the steps are shares of the time.
        minutes: give the run this time instead of a number of steps: windows and learning rate follow the clock.
        batch_tokens: tokens a step, on all devices together.
        micro_tokens: tokens a forward pass; gradients are summed over the passes of a step.
        rate: peak learning rate of both optimizers.
        warmup: steps until the peak rate.
        decay: share of the run over which the rate falls to zero.
        repeat_share: share of windows that get copied segments.
        recall_share: share of windows that get facts.
    """

    stages: tuple[tuple[int, int], ...] = ((2048, 1800), (8192, 1000), (32768, 1200))
    minutes: float = math.inf
    batch_tokens: int = 1 << 18
    micro_tokens: int = 1 << 17
    rate: float = 6e-3
    warmup: int = 150
    decay: float = 0.6
    weight_decay: float = 0.05
    repeat_share: float = 0.0
    recall_share: float = 0.0
    seed: int = 1

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(steps for _, steps in self.stages)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done after `step` steps and `seconds`; 1 or more at its end."""
        return step / self.steps if math.isinf(self.minutes) else seconds / (60 * self.minutes)

    def length(self, progress: float) -> int:
        """Window length at a share of the run, in [0, 1)."""
        done = 0
        for length, steps in self.stages:
            done += steps
            if progress < done / self.steps:
                return length
        raise UsageError(f"a run ends at 1, it has no windows at {progress}")

    def rows(self, length: int) -> int:
        """Windows a step, on all devices together."""
        return max(1, self.batch_tokens // length)


def make_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms; one learning rate suits both."""
    layers = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    embeddings = list(model.get_input_embeddings().parameters())
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "weight_decay": recipe.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=recipe.rate,
        betas=(0.9, 0.95),
        fused=next(model.parameters()).is_cuda,
    )
    return [Muon(layers, lr=recipe.rate, weight_decay=recipe.weight_decay), adam]


def _share(rows: int) -> slice:
    # The windows of a step that this process takes: as many as the others, or one more.
    if not dist.is_initialized():
        return slice(0, rows)
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * rows // world, (rank + 1) * rows // world)


def _sum_gradients(weights: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
    # One message for all gradients and the loss.
    if not dist.is_initialized():
        return loss
    flat = torch.cat([*(weight.grad.flatten() for weight in weights if weight.grad is not None), loss[None]])
    dist.all_reduce(flat)
    *pieces, total = torch.split(flat, [*(weight.numel() for weight in weights), 1])
    for weight, piece in zip(weights, pieces, strict=True):
        weight.grad = piece.view_as(weight)
    return total[0]


class _Clock:
    """Seconds of training, the same in every process: those of the first."""

    def __init__(self, before: float) -> None:
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(()))  # none begins before all are ready
        self._began = time.monotonic() - before

    def seconds(self) -> float:
        spent = torch.tensor(time.monotonic() - self._began, dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(spent, 0)  # through the CPU: asking the device would wait for its queued work
        return float(spent)


def train(
    packed: Packed,
    config: Mapping[str, Any],
    recipe: Recipe,
    out: Path,
    *,
    weights: Mapping[str, float] = WEIGHTS,
    facts: Facts | None = None,
    init: Path | None = None,
    state: Path | None = None,
    until: float = math.inf,
    save_every: int = 500,
    device: str = "cpu",
    compile_model: bool = False,
) -> list[float]:
    """Train a model on packed documents and write it to a folder that AutoModelForCausalLM loads.

    Where torch.distributed is initialised, each process takes its share of the windows of a step, all end with the
    same weights, and the first one writes them.

    Args:
        packed: documents tokenised with the tokenizer that belongs to the model.
        config: the model's configuration, as in `config.json`.
        recipe: lengths, steps, rates.
        out: folder for `config.json` and `model.safetensors`, rewritten every `save_every` steps.
        weights: factor of a category's chance to be drawn, 1 where not given.
        facts: what the recipe's `recall_share` of windows states and asks.
        init: folder of a trained model with this configuration to start from; by default random weights.
        state: file that keeps weights and optimizers; when it exists the run goes on from it.
        until: stop in good order after this step; with `state`, the next call goes on.
        save_every: steps from one writing to the next.
        device: where to train; CUDA trains in bfloat16 autocast.
        compile_model: use torch.compile, and FlexAttention for sliding layers. Compilation comes first and does
            not count as time of training.

    Returns:
        Mean loss, in nats a token, of each step of this call.

    Raises:
        UsageError: sizes that cannot work together, or a learning rate that lets the loss run away.
        InputError: no document is as long as a stage's windows.
        OutputError: `state` belongs to a run with another recipe or configuration.
    """
    if len(packed.token_bytes) > config["vocab_size"]:
        raise UsageError(
            f"the data has {len(packed.token_bytes)} token ids, the model {config['vocab_size']}; "
            "pack with the model's own tokenizer"
        )
    world = dist.get_world_size() if dist.is_initialized() else 1
    first_process = world == 1 or dist.get_rank() == 0
    longest = max(length for length, _ in recipe.stages)
    if longest > config["max_position_embeddings"]:
        raise UsageError(f"the model has {config['max_position_embeddings']} positions; use no longer --stage")
    if recipe.rows(longest) < world:
        raise UsageError(f"{recipe.rows(longest)} windows a step for {world} processes; raise --batch-tokens")
    model = new_model(config, recipe.seed).to(device)
    if init is not None:
        model.load_state_dict(load_model(init, device).state_dict())
    optimizers = make_optimizers(model, recipe)
    step, seconds = 0, 0.0
    identity = json.dumps([dict(config), repr(recipe), dict(weights)])
    if state is not None and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        if saved["identity"] != identity:
            raise OutputError(f"{state} is of another run; remove it or repeat that run's options")
        model.load_state_dict(saved["model"])
        for optimizer, kept in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, seconds = saved["step"], saved["seconds"]
    sampler = WindowSampler(packed, weights, recipe.repeat_share, recipe.seed, recipe.recall_share, facts)
    tokens = torch.from_numpy(sampler.tokens.astype(np.int32)).to(device)
    losses_of = compiled_losses(model) if compile_model else token_losses
    parameters = list(model.parameters())
    model.train()

    def save() -> None:
        if not first_process:
            return
        save_model(model, config, out)
        if state is not None:
            kept = {"identity": identity, "step": step, "seconds": seconds, "model": model.state_dict()}
            kept["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            with publish(state) as path:
                torch.save(kept, path)

    def backward(positions: torch.Tensor, length: int) -> torch.Tensor:
        # Adds to the gradients of the step's mean loss; gives this process's part of that loss.
        total = torch.zeros((), device=device)
        for micro in torch.split(positions, max(1, recipe.micro_tokens // length)):
            ids = tokens[micro].long()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device.startswith("cuda")):
                loss = losses_of(model, ids[:, :-1], ids[:, 1:]).sum() / (recipe.rows(length) * length)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    if compile_model:
        for length in dict.fromkeys(length for length, _ in recipe.stages):
            began = time.monotonic()
            rows = _share(recipe.rows(length))
            backward(torch.zeros(rows.stop - rows.start, length + 1, dtype=torch.long, device=device), length).item()
            if first_process:
                print(f"compiled for windows of {length} in {time.monotonic() - began:.0f} s", file=sys.stderr)
        model.zero_grad(set_to_none=True)
    losses: list[torch.Tensor] = []
    clock = _Clock(seconds)
    logged = (step, seconds)
    while (progress := recipe.progress(step, seconds)) < 1 and step < until:
        length = recipe.length(progress)
        drawn = torch.from_numpy(sampler.draw(step, recipe.rows(length), length, _share(recipe.rows(length))))
        if device.startswith("cuda"):
            drawn = drawn.pin_memory()  # copied without waiting for the device's queued work
        losses.append(_sum_gradients(parameters, backward(drawn.to(device, non_blocking=True), length)))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * learning_rate(step, progress, recipe.warmup, recipe.decay)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % LOG_EVERY == 0:
            # float() waits for the device: the time below is the time of finished work.
            recent = float(torch.stack(losses[-LOG_EVERY:]).mean())
            if not math.isfinite(recent):
                raise UsageError(f"the loss is {recent} at step {step}; lower --rate")
        seconds = clock.seconds()
        if step % LOG_EVERY == 0 and first_process:
            rate = (step - logged[0]) * recipe.batch_tokens / (seconds - logged[1])
            logged = (step, seconds)
            print(
                f"step {step} ({recipe.progress(step, seconds):.1%}) length {length} loss {recent:.4f} "
                f"{rate / 1e6:.2f} M tokens/s {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if step % save_every == 0:
            save()
    save()
    if first_process:
        print(f"{step} steps, {step * recipe.batch_tokens / 1e6:.0f} M tokens, {seconds:.0f} s", file=sys.stderr)
    return [float(loss) for loss in losses]
