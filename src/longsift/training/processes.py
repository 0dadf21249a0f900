"""The processes of one training, one a device, as torchrun or `accelerate launch` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # of those that wait while the first process tokenises


def process_count() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train together.

    Attributes:
        first: this is the one that prepares, reports and saves.
        group: over which they wait for each other; None where there is one process.
    """

    first: bool
    group: Any = None

    def told(self, value: T) -> T:
        """What the first process has, in every process; waits until it has it."""
        if self.group is None:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the other processes, if a launcher started several.

    Tokenising a large corpus takes longer than the time after which the training's own group takes a process for dead,
    so a group apart waits for it.
    """
    if process_count() == 1:
        yield Processes(first=True)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        yield Processes(torch.distributed.get_rank() == 0, group)
    finally:
        torch.distributed.destroy_process_group()
