"""What a user can ask of `longsift train-calculator`; no torch is imported here, so that `--help` stays quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from longsift.errors import UsageError
from longsift.options import _check, _flag


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Training a calculator: which model, on which windows, how."""

    model: str | None = _flag(None, "Model to continue: embedded, a folder, or org/name[@revision].")
    revision: str | None = _flag(None, "Revision of a Hugging Face id.")
    trust_remote_code: bool = _flag(False, "Run code that comes with the checkpoint.", "--trust-remote-code")
    from_scratch: str | None = _flag(None, "Train a new model: its config.json, or a folder or id that has one.")
    tokenizer: str | None = _flag(None, "Tokenizer: a folder or id. Default: the model's own.")
    rope_theta: float | None = _flag(None, "New RoPE base (LADM: 500000). Default: as it is.")

    text_key: str = _flag("text", "Column of the text; a dotted path works.")
    group_by: str | None = _flag(None, "Column of the group, for the card. Default: source, where present.")
    tab_ids: bool = _flag(False, "Lines are 'id<TAB>{json}'.", "--tab-ids")
    limit: int | None = _flag(None, "Read at most N documents.")
    max_bad: float = _flag(0.001, "Share of bad rows above which nothing is trained.")
    data: str | None = _flag(None, "Folder to keep the tokenised windows in, for other runs. Default: within OUT.")

    window: int = _flag(32_768, "Tokens in a window, into which documents are packed.")
    tokens: int | None = _flag(None, "Tokens to train on. Default: every window once.")
    batch_tokens: int = _flag(1 << 20, "Tokens a step, over all devices.")
    device_batch: int = _flag(1, "Windows that a device holds at once; the rest of a step is accumulated.")
    rate: float | None = _flag(None, "Peak learning rate. [default: 2e-5, or 3e-4 from scratch]")
    schedule: Literal["linear", "cosine"] = _flag("linear", "How the rate falls to zero after the warm-up.")
    warmup: float = _flag(0.03, "Share of the steps in which the rate rises.")
    beta2: float = _flag(0.999, "Second moment's decay in AdamW; the first one's is 0.9.")
    weight_decay: float = _flag(0.0, "Weight decay of AdamW.")
    clip: float = _flag(1.0, "Largest norm of a step's gradient.")
    seed: int = _flag(0, "Seed of the order of windows, and of new weights.")

    device: Literal["auto", "cpu", "cuda"] = _flag("auto", "Where to train.")
    dtype: Literal["auto", "float32", "bfloat16"] = _flag(
        "auto", "Type to compute and to save in; bfloat16 where the device has it. Weights are trained in float32."
    )
    attention: Literal["auto", "flex", "flash", "sdpa"] = _flag(
        "auto", "Attention kernel; sdpa holds a map of window x window. Default: flex or flash on a GPU."
    )
    activation_checkpointing: bool = _flag(
        True,
        "Compute activations twice rather than keep them.",
        "--activation-checkpointing/--no-activation-checkpointing",
    )

    validation: str | None = _flag(None, "Documents to measure the loss on, by position: file, folder, glob or URL.")
    validation_windows: int = _flag(64, "Windows of them to measure, at most.")
    validate_every: int = _flag(100, "Steps between measures; the last step is always measured.")
    save_every: int = _flag(100, "Steps between checkpoints, from which a run goes on exactly.")

    def __post_init__(self) -> None:
        whole = (
            "limit",
            "tokens",
            "batch_tokens",
            "device_batch",
            "validation_windows",
            "validate_every",
            "save_every",
        )
        for name in whole:
            _check(self, name, lambda value: value >= 1, "at least 1")
        _check(self, "window", lambda value: value >= 16, "at least 16")
        for name in ("rope_theta", "rate", "clip"):
            _check(self, name, lambda value: 0 < value < math.inf, "a positive number")
        for name in ("warmup", "max_bad"):
            _check(self, name, lambda value: 0 <= value <= 1, "a share from 0 to 1")
        _check(self, "beta2", lambda value: 0 < value < 1, "between 0 and 1")
        _check(self, "weight_decay", lambda value: 0 <= value < math.inf, "0 or a positive number")
        _check(self, "seed", lambda value: 0 <= value < 2**32, "a 32-bit number")  # numpy's seeds
        for name in ("model", "revision", "from_scratch", "tokenizer", "data", "validation", "text_key", "group_by"):
            _check(self, name, lambda value: value != "", "a name")
        if (self.model is None) == (self.from_scratch is None):
            raise UsageError("Give either --model, to continue one, or --from-scratch CONFIG, to begin one.")
        if self.from_scratch is not None and self.tokenizer is None:
            raise UsageError("--from-scratch needs --tokenizer: a folder or Hugging Face id.")
