"""The processes of one training, one a device, as torchrun or `accelerate launch` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from longsift.errors import LongsiftError

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

    def led(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process alone; every process waits for it and has what it gave.

        Raises:
            LongsiftError: in the first process, as `work` raised it.
            SystemExit: in the others then, which have nothing to add.
        """
        if self.group is None:
            return work()
        told: list[Any] = [None, 0]  # what it gave, exit code
        failure: LongsiftError | None = None
        if self.first:
            try:
                told[0] = work()
            except LongsiftError as error:
                failure, told[1] = error, error.exit_code
        torch.distributed.broadcast_object_list(told, src=0, group=self.group)
        if failure is not None:
            raise failure
        if told[1]:
            raise SystemExit(told[1])
        given: T = told[0]
        return given


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
