"""Train a calculator: LADM's Long Attention Calculator (arXiv 2503.02502), by transformers' Trainer.

A run's folder becomes an ordinary Hugging Face model. While the run goes on it also holds `data/` (the tokenised
windows) and `checkpoints/`; `training.json` records what was asked, and in the end what came of it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from longsift import __version__
from longsift.calculators.checkpoint import EMBEDDED, INDEX, SINGLE, Location, locate
from longsift.calculators.interface import quiet as hushed
from longsift.calculators.interface import read_config, rope_of
from longsift.documents import ReadOptions
from longsift.errors import ModelError, OutputError, UnsupportedModel, UsageError
from longsift.shards import RunFolder, write_json
from longsift.sources import find_sources
from longsift.training.options import TrainOptions
from longsift.training.packing import Cutting, PackedWindows, WindowOrder, find_packed, pack
from longsift.training.processes import Processes, joined, process_count
from longsift.windows import WindowTokenizer

log = logging.getLogger(__name__)

RECORD = "training.json"
_RATES = {"continued": 2e-5, "from scratch": 3e-4}  # LADM's, and a usual one for small models
# What may be changed when a run goes on: none of these decides what a step sees or how large it is.
_FREE = {
    "data", "device", "device_batch", "attention", "activation_checkpointing", "save_every", "validate_every",
}  # fmt: skip


def train_calculator(
    inputs: Sequence[str],
    out: Path | str,
    options: TrainOptions,
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Train a causal language model on packed long windows and write it as a Hugging Face folder with a card.

    Under torchrun or `accelerate launch`, every process calls this with the same arguments. A run that was stopped goes
    on from its last checkpoint: on the same number of devices, to the same weights as if it had not been stopped.

    Args:
        inputs: documents, as `longsift run` reads them.
        out: folder of the model; a run of other options in it is refused.
        overwrite: throw away what an earlier run left in `out`.

    Returns:
        What was trained: folder, tokens, steps, losses, speed; None in every process but the first.

    Raises:
        UsageError: options that cannot work, or the `[train]` extra is missing.
        InputError: no documents.
        ModelError: a model or a tokenizer that cannot be loaded, or a loss that is not finite.
        UnsupportedModel: an architecture in which packed documents would see each other.
        OutputError: the folder holds another run or other files.
    """
    check_extra()
    device = choose_device(options)
    plan = Plan(options, inputs)
    attention = plan.attention(device)
    run = RunFolder(out)
    if options.model is not None and Path(options.model).resolve() == run.path.resolve():
        raise UsageError(f"-o {out} is the model that is to be continued. Choose another output folder.")
    with ExitStack() as held:
        processes = held.enter_context(joined(device))
        quiet = quiet or not processes.first

        def begin() -> dict[str, Any] | None:
            _check_folder(run.path, overwrite)
            held.enter_context(run.lock())
            return _begin(run.path, plan.identity, overwrite)

        done = processes.led(begin)
        if done is None:
            model = plan.build()  # first, since it may fail, and tokenising may take hours
            data = Path(options.data) if options.data is not None else run.path / "data"
            windows = plan.pack(inputs, data / "train", processes, quiet)
            validation = None
            if options.validation is not None:
                validation = plan.pack([options.validation], data / "validation", processes, quiet)
            done = _train(plan, run.path, model, attention, windows, validation, device, quiet)
            if processes.first:
                write_json(run.path / RECORD, {"longsift": __version__, "identity": plan.identity, "result": done})
                _remove(run.path / "checkpoints")
                if options.data is None:
                    _remove(data)
        return done if processes.first else None


def check_extra() -> None:
    """Raises UsageError where the packages of the `[train]` extra are not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("Training needs accelerate: pip install 'longsift[train]'")


def choose_device(options: TrainOptions) -> torch.device:
    """The device of this process: the GPU that its launcher means it to have, the first one, or the CPU.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no GPU that PyTorch can use.")
    if options.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        log.warning("one of %d GPUs is used; for all: torchrun --nproc-per-node %d -m longsift …", count, count)
    return torch.device("cuda", rank)


class Plan:
    """What a run is: its configuration, tokenizer, batches and identity, worked out before anything is written.

    Attributes:
        config: the model's configuration, with the new RoPE base and room for the window.
        identity: everything that the trained weights depend on, as JSON values.
        windows_per_step: over all devices and accumulated passes.
    """

    def __init__(self, options: TrainOptions, inputs: Sequence[str]) -> None:
        self.options = options
        self.location = self._locate()
        self.config = self._config()
        self.tokenizer = WindowTokenizer.load(*self._tokenizer_name(), options.trust_remote_code)
        self.end: int | None = self.hf_tokenizer().eos_token_id
        self.accumulation = round(options.batch_tokens / (options.window * options.device_batch * process_count()))
        if not self.accumulation:
            least = options.window * options.device_batch * process_count()
            raise UsageError(
                f"--batch-tokens {options.batch_tokens:,} is less than one pass of all devices, {least:,} tokens. "
                "Give more, or a shorter --window."
            )
        self.windows_per_step = self.accumulation * options.device_batch * process_count()
        self.read = ReadOptions(text_key=options.text_key, group_by=options.group_by, tab_ids=options.tab_ids)
        self.identity = json.loads(
            json.dumps(
                {
                    **{name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE},
                    "inputs": self._data_identity(inputs)["sources"],
                    "tokenizer": self.tokenizer.fingerprint,
                    "model": options.from_scratch or self.location.name,
                    "revision": self.location.revision,
                    "windows_per_step": self.windows_per_step,
                }
            )
        )

    def _locate(self) -> Location:
        options = self.options
        if options.from_scratch is not None:  # only its configuration is read
            return Location(options.from_scratch, "", options.from_scratch, options.revision, "")
        assert options.model is not None
        location = locate(options.model, options.revision)
        if location.weights not in (SINGLE, INDEX):
            raise ModelError(f"'{options.model}' cannot be continued: give a folder with {SINGLE} or {INDEX}.")
        return location

    def _config(self) -> Any:
        options = self.options
        config = read_config(self.location, trust_remote_code=options.trust_remote_code, rope_theta=options.rope_theta)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and longest < options.window:
            if options.from_scratch is None and rope_of(config) is None:
                raise ModelError(
                    f"{self.location.name} has learned positions for {longest} tokens, so it cannot take windows "
                    f"of {options.window}. Give --window {longest}, or a model with RoPE."
                )
            config.max_position_embeddings = options.window
        config.use_cache = False
        for dropout in ("attention_dropout", "attn_pdrop"):
            if getattr(config, dropout, 0.0):
                setattr(config, dropout, 0.0)  # not every attention kernel has it
        return config

    def _tokenizer_name(self) -> tuple[str, str | None]:
        name, revision = self.options.tokenizer or self.location.pretrained, None
        if self.options.tokenizer is None:
            revision = self.location.revision
        return (str(EMBEDDED) if name == "embedded" else name), revision

    def hf_tokenizer(self) -> Any:
        """The tokenizer as transformers has it, to save with the model."""
        name, revision = self._tokenizer_name()
        repo, _, given = name.partition("@") if not Path(name).exists() else (name, "", "")
        with hushed():
            return transformers.AutoTokenizer.from_pretrained(
                repo, revision=revision or given or None, trust_remote_code=self.options.trust_remote_code
            )

    @property
    def cutting(self) -> Cutting:
        """How documents become pieces of windows."""
        return Cutting(self.tokenizer, self.end, self.config.vocab_size, self.options.window)

    def _data_identity(self, inputs: Sequence[str]) -> dict[str, Any]:
        options = self.options
        return {
            "sources": [[source.url, source.size, source.version] for source in find_sources(inputs)],
            "tokenizer": self.tokenizer.fingerprint,
            "end": self.end,
            "window": options.window,
            "text_key": options.text_key,
            "group_by": options.group_by,
            "tab_ids": options.tab_ids,
            "limit": options.limit,
        }

    def pack(self, inputs: Sequence[str], folder: Path, processes: Processes, quiet: bool) -> PackedWindows:
        """The windows of documents: made by the first process, waited for by the others."""
        identity = self._data_identity(inputs)

        def make() -> None:
            pack(
                find_sources(inputs),
                folder,
                self.cutting,
                self.read,
                limit=self.options.limit,
                max_bad=self.options.max_bad,
                identity=identity,
                quiet=quiet,
            )

        processes.led(make)
        packed = find_packed(folder, identity)
        if packed is None:
            raise OutputError(f"{folder} was not found by every process: OUT and --data must be on a shared disk.")
        return packed

    def steps(self, windows: int) -> int:
        """Steps of the training, when there are so many windows."""
        step = self.windows_per_step * self.options.window
        return -(-(self.options.tokens or windows * self.options.window) // step)

    @property
    def kind(self) -> str:
        """ "from scratch" or "continued"."""
        return "continued" if self.options.from_scratch is None else "from scratch"

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return self.options.rate or _RATES[self.kind]

    def dtype(self, device: torch.device) -> torch.dtype:
        """The type to compute and to save in."""
        if self.options.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.options.dtype]
        has = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has else torch.float32

    def attention(self, device: torch.device) -> str:
        """The name of the attention to train with, as transformers knows it.

        Raises:
            UsageError: this device or this model cannot have the one that is asked for.
        """
        from longsift.training.packed_attention import choose_attention

        options = self.options
        return choose_attention(options.attention, device, self.config, options.window, options.device_batch)

    def build(self) -> Any:
        """The model to train, in float32 on the CPU.

        Raises:
            ModelError: its weights cannot be loaded.
            UnsupportedModel: packed documents would see each other.
        """
        from longsift.training.packed_attention import check_documents_apart, choose_attention

        plain = choose_attention("auto", torch.device("cpu"), self.config, 0, 1)
        settings = {
            "dtype": torch.float32,
            "attn_implementation": plain,
            "trust_remote_code": self.options.trust_remote_code,
        }
        try:
            with hushed():
                if self.options.from_scratch is not None:
                    transformers.set_seed(self.options.seed)
                    model = transformers.AutoModelForCausalLM.from_config(self.config, **settings)
                else:
                    model, info = transformers.AutoModelForCausalLM.from_pretrained(
                        self.location.downloaded().folder,
                        config=self.config,
                        use_safetensors=True,
                        output_loading_info=True,
                        **settings,
                    )
                    if missing := sorted(info["missing_keys"]):
                        raise ModelError(
                            f"{self.location.name} lacks {len(missing)} tensors of the causal language model that its "
                            f"config.json describes, for example '{missing[0]}'."
                        )
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
            raise ModelError(f"{self.location.name} cannot be built: {error}") from error
        if not getattr(model, "_supports_attention_backend", False):
            raise UnsupportedModel(
                f"The architecture '{self.config.model_type}' does not take an attention of ours, and no method can "
                "measure it. Use a plain attention model, such as a Llama, Qwen, Mistral, Gemma or OLMo."
            )
        check_documents_apart(model)
        return model


def _check_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file. Choose another output folder.")
    if not out.is_dir() or (out / RECORD).exists():
        return
    if others := sorted(path.name for path in out.iterdir() if path.name not in (".lock", "data")):
        raise OutputError(f"{out} holds {others[0]}, which is not of a training. Choose another output folder.")


def _begin(out: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Start or continue the run in `out`; returns the result of one that is finished."""
    record: dict[str, Any] = {}
    if (out / RECORD).exists():
        try:
            record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        except ValueError as error:
            if not overwrite:
                raise OutputError(f"{out / RECORD} is damaged ({error}). Start again with --overwrite.") from error
    if record and not overwrite:
        known = record["identity"]
        changed = sorted(key for key in known | identity if known.get(key) != identity.get(key))
        if changed:
            raise OutputError(
                f"{out} holds another run, with other {', '.join(changed)}. Choose another output folder, or throw "
                "that run away with --overwrite."
            )
        result: dict[str, Any] | None = record.get("result")
        return result
    for path in out.iterdir():
        if path.name not in (".lock", "data"):
            _remove(path)
    write_json(out / RECORD, {"longsift": __version__, "identity": identity})
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _arguments(
    plan: Plan, out: Path, steps: int, device: torch.device, validated: bool
) -> transformers.TrainingArguments:
    options = plan.options
    cuda = device.type == "cuda"
    arguments = transformers.TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=options.device_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=plan.rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=round(options.warmup * steps),
        adam_beta1=0.9,
        adam_beta2=options.beta2,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=plan.dtype(device) == torch.bfloat16,
        average_tokens_across_devices=True,
        seed=options.seed,
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        eval_strategy="steps" if validated else "no",
        eval_steps=options.validate_every,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
    )
    if arguments.n_gpu > 1:  # started without a launcher: the Trainer would split every batch over threads
        arguments._n_gpu = 1
    return arguments


def _train(
    plan: Plan,
    out: Path,
    model: Any,
    attention: str,
    windows: PackedWindows,
    validation: PackedWindows | None,
    device: torch.device,
    quiet: bool,
) -> dict[str, Any]:
    from longsift.training.card import write_card
    from longsift.training.hf_trainer import CalculatorTrainer, Reporter, TrainingProgress, last_checkpoint

    options = plan.options
    steps = plan.steps(len(windows))
    model.set_attn_implementation(attention)
    if options.activation_checkpointing:
        # Called here, since the Trainer's argument has another name in each version, as has this.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with hushed(), redirect_stdout(sys.stderr):  # stdout is for results, whatever a library prints
        arguments = _arguments(plan, out, steps, device, validation is not None)
        checkpoint = last_checkpoint(out / "checkpoints")
        before = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        tokens = plan.windows_per_step * options.window
        order = WindowOrder(windows, steps * plan.windows_per_step, options.seed)
        started = time.perf_counter()
        with TrainingProgress(steps * tokens, done=before * tokens, quiet=quiet) as progress:
            progress.count(steps=before)
            trainer = CalculatorTrainer(
                model, arguments, order, validation, options.validation_windows, [Reporter(progress, tokens)]
            )
            trainer.remove_callback(transformers.PrinterCallback)  # it prints to stdout, which is for results
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"Out of GPU memory with {options.device_batch} × {options.window:,} tokens a pass. Use "
                    f"--device-batch 1, activation checkpointing, a shorter --window or a smaller model. ({error})"
                ) from error
        seconds = time.perf_counter() - started
        history = trainer.state.log_history
        if validation is not None and not any("eval_loss" in entry and entry["step"] == steps for entry in history):
            trainer.evaluate()
    losses = [entry for entry in history if "loss" in entry]
    result = {
        "model": str(out),
        "steps": steps,
        "tokens": steps * tokens,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "windows": len(windows),
        "filled": windows.counts["tokens"] / (len(windows) * options.window),
        "loss": sum(entry["loss"] for entry in losses[-10:]) / len(losses[-10:]),
        **_validated(history),
        "attention": attention.removeprefix("longsift_"),
        "dtype": str(plan.dtype(device)).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": process_count(),
        "resumed_at_step": before or None,
        "seconds": seconds,
        "tokens_per_second": (steps - before) * tokens / seconds,
    }
    if trainer.is_world_process_zero():
        _save(plan, model, out, plan.dtype(device))
        write_card(out, plan, result, windows.counts, history, tokens)
    return result


def _validated(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last validation's loss, and that by position."""
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), None)
    if last is None:
        return {}
    lows = [int(name.rpartition("_")[2]) for name in last if name.startswith("eval_loss_from_")]
    return {
        "validation_loss": last["eval_loss"],
        "loss_by_position": [
            {
                "from_position": low,
                "loss": last[f"eval_loss_from_{low}"],
                "tokens": int(last[f"eval_tokens_from_{low}"]),
            }
            for low in lows
        ],
    }


def _save(plan: Plan, model: Any, out: Path, dtype: torch.dtype) -> None:
    """Write the model and its tokenizer as an ordinary Hugging Face folder."""
    model.to(dtype)
    model.config.use_cache = True
    with hushed():
        model.save_pretrained(out)
    tokenizer = plan.hf_tokenizer()
    tokenizer.model_max_length = max(plan.options.window, plan.config.max_position_embeddings or 0)
    tokenizer.save_pretrained(out)
