"""Forwards recorded as CUDA graphs, since a host takes longer to launch a small model's kernels than a GPU to run them.

The first forward of a length makes what is made once, the second is watched, the third is recorded and from then on
replayed: the same kernels with the same numbers, so the results are the same bits. A forward in which the host waits
for the GPU (as for RoPE that depends on the largest position) cannot be recorded and stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

MOST = 8  # recordings; what comes after stays as it is
LONGEST = 1 << 16  # tokens: beyond, the launches take no time next to the kernels, and the memory is wanted elsewhere

Columns = dict[str, Tensor]
Compute = Callable[[Tensor], Columns]


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    input_ids: Tensor  # where the graph reads its window
    columns: Columns  # where it leaves its results

    @torch.inference_mode()  # its tensors may have been made in it, and can then be written in it alone
    def replay(self, input_ids: Tensor) -> Columns:
        self.input_ids.copy_(input_ids)
        self.graph.replay()
        return {name: column.clone() for name, column in self.columns.items()}


class Recorder:
    """Runs computations on one GPU, recorded where that can be done. Not for several threads at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recordings: dict[Hashable, _Recording] = {}
        self._recordable: dict[Hashable, bool | None] = {}  # of what came once; None: not known yet
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._full = False

    @property
    def recorded(self) -> int:
        """How many recordings there are."""
        return len(self._recordings)

    def run(self, key: Hashable, compute: Compute, input_ids: Tensor) -> Columns:
        """`compute(input_ids)`.

        Args:
            key: equal only for what computes the same from input_ids of this shape.
            compute: reads input_ids and tensors that outlive the recorder unchanged, and returns new tensors.
            input_ids: (1, length), on the device.

        Raises:
            torch.OutOfMemoryError: there is too little memory even with no recording kept.
        """
        try:
            return self._run((key, *input_ids.shape), compute, input_ids)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
        # Here, since an exception that is being handled holds on to the memory of all that it passed through.
        log.info("out of GPU memory at %d tokens: no forward is recorded any more", input_ids.shape[1])
        self.forget()
        return compute(input_ids)

    def forget(self) -> None:
        """Free the memory of all recordings, and record no more."""
        self._full = True
        self._recordings.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _run(self, key: Hashable, compute: Compute, input_ids: Tensor) -> Columns:
        recording, length = self._recordings.get(key), input_ids.shape[1]
        if recording is not None:
            return recording.replay(input_ids)
        if self._full or len(self._recordings) >= MOST or length > LONGEST:
            return compute(input_ids)
        if key not in self._recordable:
            self._recordable[key] = None
        elif self._recordable[key] is None:
            with Waits(self._device.type) as waits:
                columns = compute(input_ids)
            self._recordable[key] = waits.found is None
            if waits.found is not None:
                log.info("forwards of %d tokens are not recorded: the host waits in %s", length, waits.found)
            return columns
        elif self._recordable[key]:
            self._recordable[key] = False  # it is tried once
            recording = self._record(compute, input_ids)
            if recording is not None:
                self._recordings[key] = recording
                return recording.replay(input_ids)
        return compute(input_ids)

    def _record(self, compute: Compute, input_ids: Tensor) -> _Recording | None:
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            graph, own = torch.cuda.CUDAGraph(), input_ids.clone()
            try:
                # The outer context puts the stream back where the inner one fails; other threads may go on.
                with (
                    torch.cuda.stream(torch.cuda.current_stream(self._device)),
                    torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
                ):
                    columns = compute(own)
            except RuntimeError as error:  # also where the memory is too small for a recording
                log.info("a forward of %d tokens could not be recorded: %s", input_ids.shape[1], error)
                self._pool = None  # the allocator takes no second recording into a pool of one that did not end
                return None
        return _Recording(graph, own, columns)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in `found` an operation in which the host waits for a device of this type."""

    _READS = frozenset(
        {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.lift_fresh.default,  # of what `torch.tensor` has copied there
            torch.ops.aten.masked_select.default,
            torch.ops.aten.nonzero.default,
        }
    )
    _INDEXES = frozenset({torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default})
    _COPIES = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default})

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device_type
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [leaf for leaf in given if leaf.device.type == self._type]
        waits = (
            (func in self._READS and on_device)
            or (func in self._INDEXES and any(leaf.dtype == torch.bool for leaf in on_device[1:]))
            or (func in self._COPIES and on_device and len({x.device.type for x in (*given, out)}) > 1)
            or (func in self._COPIES and not on_device and out.device.type == self._type)
        )
        if waits and self.found is None:
            self.found = str(func)
        return out
