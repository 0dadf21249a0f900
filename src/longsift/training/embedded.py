"""Train the small calculator that ships with longsift, or one like it from your own long documents.

Each step is a command; the defaults are the numbers of the shipped model, the fourth step its second run::

    python -m longsift.training.embedded tokenizer docs-*.jsonl.zst --out first
    python -m longsift.training.embedded pack docs-*.jsonl.zst --tokenizer first --out packed
    python -m longsift.training.embedded train packed --out first --state state.pt --compile
    python -m longsift.training.embedded train packed --init first --out model --compile --stage 8192:650 \\
        --rate 2e-3 --warmup 30 --decay 0.9 --repeat-share 0.5 --seed 2
    cp first/tokenizer* model && python -m longsift.training.embedded evaluate model packed-valid

Documents are JSON lines with `text` and, if there are categories, `source`. The model is a plain Llama with tied
embeddings, so any program that reads Llama reads it. Every training window lies inside one document and has no
padding, so no mask but the causal one is needed. In the second run, half of the windows hold a copied segment:
a model this small learns to follow a distant repetition surely only when repetition surely pays.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import LlamaForCausalLM

from longsift.errors import LongsiftError, OutputError, UsageError
from longsift.tables import publish
from longsift.training.corpus import (
    Packed,
    WindowSampler,
    load_packed,
    pack,
    read_texts,
    sample_texts,
    save_packed,
    save_tokenizer,
    train_tokenizer,
)
from longsift.training.figures import evaluate
from longsift.training.llama import load_model, new_model, save_model, token_losses

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": True,
    "dtype": "bfloat16",
}
# Degenerate and patched-together text should not surprise the model, but it should not spend itself on it.
WEIGHTS = {"concat": 0.5, "noise": 0.25}


def learning_rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor of the peak rate: linear warm-up, a plateau, then linear to zero over the last `decay` of the steps."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained; the defaults made the shipped one.

    Attributes:
        stages: (window length in tokens, steps) in order.
        batch_tokens: tokens a step.
        micro_tokens: tokens a forward pass; gradients are summed over the passes of a step.
        rate: peak learning rate of both optimizers.
        decay: share of the steps over which the rate falls to zero.
        repeat_share: share of windows that get a copied segment of up to length/8 tokens.
    """

    stages: tuple[tuple[int, int], ...] = ((2048, 4200), (8192, 2600))
    batch_tokens: int = 1 << 18
    micro_tokens: int = 1 << 17
    rate: float = 6e-3
    warmup: int = 200
    decay: float = 0.5
    weight_decay: float = 0.05
    repeat_share: float = 0.0
    seed: int = 1

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(steps for _, steps in self.stages)

    def length(self, step: int) -> int:
        """Window length at a step."""
        for length, steps in self.stages:
            if step < steps:
                return length
            step -= steps
        raise UsageError(f"the recipe has {self.steps} steps only")


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (Jordan et al. 2024), AdamW for embeddings and norms.

    Raises:
        UsageError: PyTorch is older than 2.9 and has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UsageError("training needs torch.optim.Muon; install torch>=2.9")
    layers = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    embeddings = list(model.get_input_embeddings().parameters())
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    muon = torch.optim.Muon(
        layers,
        lr=recipe.rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # one learning rate then suits both optimizers
    )
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "weight_decay": recipe.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=recipe.rate,
        betas=(0.9, 0.95),
        fused=next(model.parameters()).is_cuda,
    )
    return [muon, adam]


def train(
    packed: Packed,
    config: Mapping[str, Any],
    recipe: Recipe,
    out: Path,
    *,
    weights: Mapping[str, float] = WEIGHTS,
    init: Path | None = None,
    state: Path | None = None,
    minutes: float = math.inf,
    save_every: int = 500,
    device: str = "cpu",
    compile_model: bool = False,
) -> list[float]:
    """Train a model on packed documents and write it to a folder that AutoModelForCausalLM loads.

    Args:
        packed: documents tokenised with the tokenizer that belongs to the model.
        config: the Llama configuration, as in `config.json`.
        recipe: lengths, steps, rates.
        out: folder for `config.json` and `model.safetensors`, rewritten every `save_every` steps.
        weights: factor of a category's chance to be drawn, 1 where not given.
        init: folder of a trained model with this configuration to start from; by default random weights.
        state: file that keeps weights and optimizers; when it exists the run goes on from it.
        minutes: stop in good order after this time; with `state`, the next call goes on.
        device: where to train; CUDA trains in bfloat16 autocast.
        compile_model: use torch.compile.

    Returns:
        Mean loss, in nats a token, of each step of this call.

    Raises:
        UsageError: sizes that cannot work together, or a learning rate that lets the loss run away.
        InputError: no document is as long as a stage's windows.
        OutputError: `state` belongs to a run with another recipe or configuration.
    """
    began = time.monotonic()
    if len(packed.token_bytes) > config["vocab_size"]:
        raise UsageError(
            f"the data has {len(packed.token_bytes)} token ids, the model {config['vocab_size']}; "
            "pack with the model's own tokenizer"
        )
    model = new_model(config, recipe.seed).to(device)
    if init is not None:
        model.load_state_dict(load_model(init, device).state_dict())
    optimizers = make_optimizers(model, recipe)
    first = 0
    identity = json.dumps([dict(config), repr(recipe), dict(weights)])
    if state is not None and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        if saved["identity"] != identity:
            raise OutputError(f"{state} is of another run; remove it or repeat that run's options")
        model.load_state_dict(saved["model"])
        for optimizer, kept in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first = saved["step"]
    sampler = WindowSampler(packed, weights, recipe.repeat_share, recipe.seed)
    tokens = torch.from_numpy(packed.tokens.astype(np.int32)).to(device)
    losses_of = torch.compile(token_losses, dynamic=False) if compile_model else token_losses
    losses: list[torch.Tensor] = []

    def save(step: int) -> None:
        save_model(model, config, out)
        if state is not None:
            kept = {"identity": identity, "step": step, "model": model.state_dict()}
            kept["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            with publish(state) as path:
                torch.save(kept, path)

    model.train()
    done = first
    for step in range(first, recipe.steps):
        length = recipe.length(step)
        positions = torch.from_numpy(sampler.draw(step, max(1, recipe.batch_tokens // length), length))
        rows = max(1, recipe.micro_tokens // length)
        total = torch.zeros((), device=device)
        for begin in range(0, len(positions), rows):
            ids = tokens[positions[begin : begin + rows].to(device)].long()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device.startswith("cuda")):
                loss = losses_of(model, ids[:, :-1], ids[:, 1:]).sum() / (len(positions) * length)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * learning_rate(step, recipe.steps, recipe.warmup, recipe.decay)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        done = step + 1
        if done % 50 == 0:
            # float() waits for the device: the time below is the time of finished work.
            recent = float(torch.stack(losses[-50:]).mean())
            if not math.isfinite(recent):
                raise UsageError(f"the loss is {recent} at step {done}; lower --rate")
            spent = time.monotonic() - began
            rate = (done - first) * recipe.batch_tokens / spent
            print(
                f"step {done}/{recipe.steps} length {length} loss {recent:.4f} "
                f"{rate / 1e6:.2f} M tokens/s {spent:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            if spent > 60 * minutes:
                break
        if done % save_every == 0:
            save(done)
    save(done)
    return [float(loss) for loss in losses]


# ----------------------------------------------------------------------------------------------------- commands


def _weight(value: str) -> tuple[str, float]:
    group, _, factor = value.rpartition("=")
    return group, float(factor)


def _stage(value: str) -> tuple[int, int]:
    length, steps = value.split(":")
    return int(length), int(steps)


def _parser() -> argparse.ArgumentParser:
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m longsift.training.embedded", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    weigh: dict[str, Any] = {
        "action": "append",
        "type": _weight,
        "metavar": "CATEGORY=FACTOR",
        "help": "how much more or less of a category to use (default: concat=0.5 noise=0.25)",
    }

    tokenizer = commands.add_parser("tokenizer", help="train the tokenizer")
    tokenizer.add_argument("inputs", nargs="+")
    tokenizer.add_argument("--out", type=Path, required=True)
    tokenizer.add_argument("--vocab-size", type=int, default=CONFIG["vocab_size"])
    tokenizer.add_argument("--group-chars", type=int, default=20_000_000, help="most characters a category")
    tokenizer.add_argument("--document-chars", type=int, default=200_000, help="most characters a document")
    tokenizer.add_argument("--weight", **weigh)

    packing = commands.add_parser("pack", help="tokenise documents once")
    packing.add_argument("inputs", nargs="+")
    packing.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    packing.add_argument("--out", type=Path, required=True)

    training = commands.add_parser("train", help="train the model, or go on training it")
    training.add_argument("packed", nargs="+", type=Path)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--init", type=Path, help="model folder to start from, instead of random weights")
    training.add_argument("--state", type=Path, help="file that lets a stopped run go on")
    training.add_argument("--minutes", type=float, default=math.inf, help="stop in good order after this time")
    training.add_argument("--stage", action="append", type=_stage, metavar="LENGTH:STEPS")
    training.add_argument("--batch-tokens", type=int, default=recipe.batch_tokens)
    training.add_argument("--micro-tokens", type=int, default=recipe.micro_tokens)
    training.add_argument("--rate", type=float, default=recipe.rate)
    training.add_argument("--warmup", type=int, default=recipe.warmup, help="steps until the peak rate")
    training.add_argument("--decay", type=float, default=recipe.decay, help="share of steps in which the rate falls")
    training.add_argument("--repeat-share", type=float, default=recipe.repeat_share)
    training.add_argument("--seed", type=int, default=recipe.seed)
    training.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--compile", action="store_true")
    training.add_argument("--weight", **weigh)

    evaluating = commands.add_parser("evaluate", help="print figures as JSON")
    evaluating.add_argument("model", type=Path)
    evaluating.add_argument("packed", nargs="+", type=Path)
    evaluating.add_argument("--length", type=int, default=CONFIG["max_position_embeddings"])
    evaluating.add_argument("--windows", type=int, default=32, help="most windows a category")
    evaluating.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _run(options: argparse.Namespace) -> None:
    weights = {**WEIGHTS, **dict(getattr(options, "weight", None) or [])}
    if options.command == "tokenizer":
        texts = sample_texts(read_texts(options.inputs), weights, options.group_chars, options.document_chars)
        save_tokenizer(train_tokenizer(texts, options.vocab_size), options.out, CONFIG["max_position_embeddings"])
    elif options.command == "pack":
        tokenizer = tokenizers.Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
        packed = pack(read_texts(options.inputs), tokenizer)
        save_packed(packed, options.out)
        print(f"{len(packed.groups)} documents, {len(packed.tokens)} tokens", file=sys.stderr)
    elif options.command == "train":
        recipe = Recipe(
            stages=tuple(options.stage) if options.stage else Recipe().stages,
            batch_tokens=options.batch_tokens,
            micro_tokens=options.micro_tokens,
            rate=options.rate,
            warmup=options.warmup,
            decay=options.decay,
            repeat_share=options.repeat_share,
            seed=options.seed,
        )
        torch.set_float32_matmul_precision("high")
        train(
            load_packed(options.packed),
            CONFIG,
            recipe,
            options.out,
            weights=weights,
            init=options.init,
            state=options.state,
            minutes=options.minutes,
            save_every=options.save_every,
            device=options.device,
            compile_model=options.compile,
        )
    else:
        figures = evaluate(
            load_model(options.model, options.device),
            load_packed(options.packed),
            options.length,
            options.windows,
        )
        print(json.dumps(figures, indent=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; give 0, or print what is wrong and give the error's exit code."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except LongsiftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
