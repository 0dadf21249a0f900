"""Train the small calculator that ships with longsift, or one like it from your own long documents.

Each step is a command; these made the shipped model, on one H200 (with several, `torchrun --nproc-per-node N -m …` and
a larger `--batch-tokens`)::

    python -m longsift.training.embedded tokenizer docs-*.jsonl.zst --out model
    python -m longsift.training.embedded pack docs-*.jsonl.zst --tokenizer model --out packed
    python -m longsift.training.embedded train packed --out model --compile --minutes 7 \\
        --stage 2048:45 --stage 8192:25 --stage 32768:30 --tokenizer model --repeat-share 0.3 --recall-share 0.3
    python -m longsift.training.embedded evaluate model packed-valid

Documents are JSON lines with `text` and, if there are categories, `source`. The models are ordinary ones of
transformers with tied embeddings. Every training window lies inside one document and has no padding, so no mask but
the causal one is needed. Some windows can hold copied segments, or facts that are stated in one place and asked for in
another: a model this small learns to look far back only when that surely pays.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.distributed as dist

from longsift.errors import LongsiftError, UsageError
from longsift.training.configs import CONFIGS, count_parameters, find_config
from longsift.training.corpus import (
    Packed,
    load_packed,
    pack,
    read_texts,
    sample_texts,
    save_packed,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)
from longsift.training.facts import Facts, make_facts
from longsift.training.figures import evaluate
from longsift.training.loop import WEIGHTS, Recipe, train
from longsift.training.model import load_model

CONFIG = CONFIGS["embedded"]


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
    training.add_argument("--config", default="embedded", help=f"{', '.join(CONFIGS)}, or a config.json")
    training.add_argument("--until", type=int, default=math.inf, metavar="STEP", help="stop in good order here")
    training.add_argument(
        "--minutes",
        type=float,
        default=recipe.minutes,
        help="give the run this time; the steps of stages are its shares",
    )
    training.add_argument("--stage", action="append", type=_stage, metavar="LENGTH:STEPS")
    training.add_argument("--batch-tokens", type=int, default=recipe.batch_tokens, help="of all devices together")
    training.add_argument("--micro-tokens", type=int, default=recipe.micro_tokens, help="of one device at a time")
    training.add_argument("--rate", type=float, default=recipe.rate)
    training.add_argument("--warmup", type=int, default=recipe.warmup, help="steps until the peak rate")
    training.add_argument("--decay", type=float, default=recipe.decay, help="share of the run in which the rate falls")
    training.add_argument("--repeat-share", type=float, default=recipe.repeat_share, help="windows with copies")
    training.add_argument("--recall-share", type=float, default=recipe.recall_share, help="windows with facts")
    training.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json, to make facts with")
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


@contextmanager
def _processes(device: str) -> Iterator[str]:
    # Under torchrun: joins the other processes and gives this one its own device.
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _facts(packed: Packed, folder: Path | None) -> Facts:
    if folder is None:
        raise UsageError("--recall-share needs --tokenizer, the folder of the one that the documents were packed with")
    tokenizer = _load_tokenizer(folder)
    if not np.array_equal(token_bytes(tokenizer), packed.token_bytes):
        raise UsageError(f"the documents were packed with another tokenizer than {folder}; give that one")
    return make_facts(tokenizer)


def _load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def _train(options: argparse.Namespace, weights: dict[str, float], device: str) -> None:
    recipe = Recipe(
        stages=tuple(options.stage) if options.stage else Recipe().stages,
        minutes=options.minutes,
        batch_tokens=options.batch_tokens,
        micro_tokens=options.micro_tokens,
        rate=options.rate,
        warmup=options.warmup,
        decay=options.decay,
        repeat_share=options.repeat_share,
        recall_share=options.recall_share,
        seed=options.seed,
    )
    torch.set_float32_matmul_precision("high")
    packed = load_packed(options.packed)
    config = find_config(options.config)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{count_parameters(config):,} parameters, {len(packed.tokens):,} tokens", file=sys.stderr)
    train(
        packed,
        config,
        recipe,
        options.out,
        weights=weights,
        facts=_facts(packed, options.tokenizer) if recipe.recall_share > 0 else None,
        init=options.init,
        state=options.state,
        until=options.until,
        save_every=options.save_every,
        device=device,
        compile_model=options.compile,
    )


def _run(options: argparse.Namespace) -> None:
    weights = {**WEIGHTS, **dict(getattr(options, "weight", None) or [])}
    if options.command == "tokenizer":
        texts = sample_texts(read_texts(options.inputs), weights, options.group_chars, options.document_chars)
        save_tokenizer(train_tokenizer(texts, options.vocab_size), options.out, CONFIG["max_position_embeddings"])
    elif options.command == "pack":
        packed = pack(read_texts(options.inputs), _load_tokenizer(options.tokenizer))
        save_packed(packed, options.out)
        print(f"{len(packed.groups)} documents, {len(packed.tokens)} tokens", file=sys.stderr)
    elif options.command == "train":
        with _processes(options.device) as device:
            _train(options, weights, device)
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
