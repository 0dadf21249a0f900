"""transformers' Trainer, with windows in our order, a validation loss by position, and progress on stderr."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch.utils.data import SequentialSampler, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from longsift.errors import ModelError
from longsift.progress import Progress
from longsift.shards import write_json
from longsift.training.packing import IGNORED, PackedWindows, WindowOrder

COMPLETE = "complete.json"  # in a checkpoint's folder: every process has written its part
_ROWS = 4096  # of logits that become float32 at once


def position_edges(window: int) -> tuple[int, ...]:
    """Where the ranges of positions begin that a loss is stated for, and their end.

    >>> position_edges(32768)
    (0, 256, 1024, 4096, 16384, 32768)
    """
    return (*(edge for edge in (0, *(256 * 4**i for i in range(12))) if edge < window), window)


class CalculatorTrainer(Trainer):  # type: ignore[misc]  # the library has no types
    """Takes training windows as they come, and measures validation windows by position.

    Args:
        validation: windows to measure; None for none.
        validation_windows: how many of them at most, the same ones each time.
    """

    control: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        windows: WindowOrder,
        validation: PackedWindows | None,
        validation_windows: int,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=windows,
            eval_dataset=validation,
            data_collator=default_collate,
            callbacks=list(callbacks),
        )
        self._validation = validation
        if validation is not None:
            order = np.random.default_rng(0).permutation(len(validation))
            self._measured = [int(index) for index in order[:validation_windows]]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss over the validation windows' tokens, in nats, and that by position in the document."""
        assert self._validation is not None
        edges = position_edges(self._validation.window)
        sums = torch.zeros(len(edges) - 1, 2, dtype=torch.float64, device=self.args.device)
        world, rank = self.args.world_size, self.args.process_index
        self.model.eval()
        # Every process runs as many windows, since a forward may wait for the others; surplus ones are not counted.
        for first in range(0, len(self._measured), world):
            at = min(first + rank, len(self._measured) - 1)
            batch = {
                name: torch.from_numpy(array)[None].to(self.args.device)
                for name, array in self._validation[self._measured[at]].items()
            }
            by_position = self._losses(batch, edges)
            if first + rank < len(self._measured):
                sums += by_position
        self.model.train()
        sums = self.accelerator.reduce(sums, "sum").cpu()
        metrics = {"eval_loss": float(sums[:, 0].sum() / sums[:, 1].sum())}
        for low, (loss, tokens) in zip(edges, sums.tolist(), strict=False):
            if tokens:
                metrics[f"eval_loss_from_{low}"] = loss / tokens
                metrics[f"eval_tokens_from_{low}"] = tokens
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _losses(self, batch: dict[str, torch.Tensor], edges: Sequence[int]) -> torch.Tensor:
        """Sum of losses and tokens of a window by range of positions, (ranges, 2) float64."""
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = self.model_wrapped(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits[0, :-1]
        labels, positions = batch["labels"][0, 1:], batch["position_ids"][0, 1:]
        losses = torch.cat(
            [
                F.cross_entropy(rows.float(), some, ignore_index=IGNORED, reduction="none")
                for rows, some in zip(torch.split(logits, _ROWS), torch.split(labels, _ROWS), strict=True)
            ]
        ).double()
        bucket = torch.bucketize(positions, torch.tensor(edges[1:], device=positions.device), right=True)
        counted = (labels != IGNORED).double()
        sums = torch.zeros(len(edges) - 1, 2, dtype=torch.float64, device=losses.device)
        return sums.index_add_(0, bucket, torch.stack((losses * counted, counted), dim=1))


class TrainingProgress(Progress):
    """Progress that states the latest losses first."""

    def __init__(self, total: int, *, done: int, quiet: bool) -> None:
        super().__init__("training", total, "tokens", done=done, quiet=quiet)
        self.losses: dict[str, float] = {}

    def line(self, *, left: bool = True) -> str:
        """The state in words, such as 'loss 2.312 · 31 steps · 31,744 of 163,840 tokens · 9,120 tokens/s'."""
        return " · ".join([*(f"{name} {loss:.3f}" for name, loss in self.losses.items()), super().line(left=left)])


class Reporter(TrainerCallback):  # type: ignore[misc]  # the library has no types
    """Counts tokens and states the loss on stderr, stops at a loss that is no number, and seals checkpoints.

    Args:
        progress: counts the run's tokens.
        tokens: of a step.
    """

    def __init__(self, progress: TrainingProgress, tokens: int) -> None:
        self._progress, self._tokens = progress, tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count a step."""
        self._progress.advance(self._tokens, steps=1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        """State the loss.

        Raises:
            ModelError: it is not finite.
        """
        for name, label in (("loss", "loss"), ("eval_loss", "validation loss")):
            if name in logs:
                loss = float(logs[name])
                if not math.isfinite(loss):
                    raise ModelError(
                        f"The loss is {loss} at step {state.global_step}. Start anew with a lower --rate, or with "
                        "--dtype float32."
                    )
                self._progress.losses[label] = loss

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark a checkpoint as whole when every process has written its part."""
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE, {"step": state.global_step, "processes": args.world_size})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
