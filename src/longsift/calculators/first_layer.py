"""The first-layer calculator: queries and keys of a model's first decoder layer, from look-up tables.

Before RoPE, what the first layer makes of a token depends on that token alone (LongAttn, Wu et al., Findings of
ACL 2025, arXiv 2502.16860, uses that layer only). So its projections are computed once a vocabulary entry and
looked up from then on, and of a checkpoint only the weights on the way from a token to its query and key are
read: the embedding, the input norm, the q and k projections with their biases, and q/k norms.

Nothing here knows an architecture. One traced forward of the model's own first layer shows which linear maps read
the normed embedding (these become tables) and which weights queries and keys depend on (these are read); norms of
q and k and RoPE are done by the model's own code on the looked-up rows. A check at load compares the tables with
the plain layer.

On a GPU the tables are of what comes out of the norms, and one kernel looks up and turns; the layer's own RoPE tells
it by how much. The same check at load decides: a layer that the kernel cannot follow (RoPE of neighbours, say) goes
the way above.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from longsift.calculators import LayerAttention
from longsift.calculators.checkpoint import Checkpoint, Location, locate
from longsift.calculators.interface import (
    Enough,
    Seen,
    build_unallocated,
    check_ids,
    choose_dtype,
    described,
    keep_layers,
    observed,
    read_config,
    run,
)
from longsift.calculators.positions import Turns, read_turns, remember_state, unturned
from longsift.calculators.turned import Layer, TurnedTables, kernel_applies
from longsift.errors import ModelError, UnsupportedModel

# Rows of one table computation. A matrix library chooses its kernel by the number of rows, and with some (MKL on AVX2)
# the bits of a row also depend on its place among them; so tables are made in fixed blocks of the vocabulary, and the
# row of a token is the same bits whatever was computed before. The number is large enough that a window of as many
# tokens gets the same kernel from the plain layer: with MKL on AVX-512 a row of a float32 product was found to change
# with the number of rows up to 2 of them (64 columns) or up to 512 (4096 columns), and not above, nor with its place.
BLOCK = 1024

# Tables of the whole vocabulary are kept up to this size; larger ones are computed anew in each call, for the
# distinct tokens of that call. Llama-3.1-8B takes 2.6 GB in float32, as much as its embedding.
TABLE_BYTES = 4 * 2**30

# Windows of up to so many tokens, or the model's own limit, are checked at load; longer ones when they come.
LONGEST_CHECK = 1 << 17

# `FirstLayer.shares` cuts the heads of long windows so that their queries take no more than this.
QUERY_BYTES = 2 * 2**30


class FirstLayer:
    """Queries and keys of the first decoder layer of a model. Make it with `FirstLayer.load`.

    Attributes:
        vocab_size: token ids are below this.
        max_length: the longest window that the model's configuration states, in tokens; None when it states none.
            Longer windows are computed all the same.
        device: where the queries and keys are.
        kv_heads: key heads.
    """

    def __init__(
        self,
        network: nn.Module,
        attention: nn.Module,
        config: Any,
        location: Location,
        bytes_read: int,
        device: torch.device,
    ) -> None:
        self.vocab_size = int(config.vocab_size)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.device = device
        self._network, self._attention, self._config, self._location = network, attention, config, location
        self._bytes_read, self._restore = bytes_read, remember_state(network)
        stages = [stage for stage in network.modules() if isinstance(stage, _Stage)]
        self._entrances = [stage for stage in stages if stage.role == "entrance"]
        self._projections = [stage for stage in stages if stage.role == "projection"]
        self._dtype = self._projections[0].dtype
        width = sum(projection.width for projection in self._projections)
        fits = self.vocab_size * width * self._dtype.itemsize <= TABLE_BYTES
        self._tables: list[torch.Tensor] = []
        self._missing = set(range(-(-self.vocab_size // BLOCK)))  # blocks of the vocabulary that are not yet made
        self._turned: TurnedTables | None = None

        some = torch.Generator().manual_seed(0)
        few = torch.randint(self.vocab_size, (48,), generator=some)
        ids = few[torch.randint(len(few), (1, BLOCK), generator=some)].to(device)
        seen = self._plain(ids)
        plain, self._window = seen.attention, seen.attention.sliding_window
        self._heads, self.kv_heads, self._head_dim = plain.q.shape[1], plain.k.shape[1], plain.q.shape[-1]
        self._scale, self._softcap = plain.scale, plain.softcap
        if fits and kernel_applies(device):
            turned = self._make_turned(ids, [projection.taken() for projection in self._projections])
            if turned.follows((BLOCK, max(BLOCK, min(self.max_length or LONGEST_CHECK, LONGEST_CHECK)))):
                self._turned = turned
                _place(network, {}, device)  # the weights have done their part
                network.requires_grad_(False)
                return
            del turned
        if fits:
            self._tables = [
                torch.empty(self.vocab_size, projection.width, dtype=self._dtype, device=device)
                for projection in self._projections
            ]
        self._check(ids, plain)

    @classmethod
    @torch.inference_mode(False)  # the trace needs a recorded graph, wherever this is called
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        rope_theta: float | None = None,
        trust_remote_code: bool = False,
    ) -> FirstLayer:
        """Read the first layer of a model.

        Args:
            model: "embedded", a folder, a `.safetensors` file or a hub id, as `checkpoint.locate` takes them.
            revision: branch, tag or commit of a hub model.
            device: where the queries and keys are computed.
            dtype: the type they are computed in; by default float32 on a CPU and the checkpoint's type elsewhere.
            rope_theta: another RoPE base; the rest of the RoPE settings stays. (LongAttn's published code takes 2.5e6.)
            trust_remote_code: let transformers run code that comes with the checkpoint.

        Raises:
            ModelError: the checkpoint cannot be found or read.
            UnsupportedModel: its first layer cannot be measured faithfully by tables.
            UsageError: `rope_theta` for a model without RoPE.
        """
        location = locate(model, revision)
        target = torch.device(device)
        config = keep_layers(read_config(location, trust_remote_code=trust_remote_code, rope_theta=rope_theta), 1)
        network = build_unallocated(config, choose_dtype(config, target, dtype), trust_remote_code=trust_remote_code)
        checkpoint = Checkpoint(location)
        _place(network, {}, target)
        trace = _trace(network, config, target)
        _place(network, _read(checkpoint, trace.weights), target)
        network.requires_grad_(False)
        _install(network, trace)
        return cls(network, network.get_submodule(trace.attention), config, location, checkpoint.bytes_read, target)

    def queries_keys(
        self, input_ids: torch.Tensor, *, rows: torch.Tensor | None = None, kv_heads: range | None = None
    ) -> LayerAttention:
        """The first layer's queries and keys of whole windows; every window's are the same bits as alone.

        Args:
            input_ids: (batch, length) token ids. On a GPU their range is not checked, since that would wait for it.
            rows: ascending positions, (rows,) int64 on the device, of the queries to make; by default all. Keys are
                made for the whole window.
            kv_heads: consecutive key heads to make, with all queries that share them; by default all.

        Raises:
            ModelError: an id outside the vocabulary.
        """
        ids = check_ids(input_ids, self.vocab_size, self.device)
        kv_heads = range(self.kv_heads) if kv_heads is None else kv_heads
        if self._turned is not None:
            q, k = self._turned.look_up(ids, rows, kv_heads)
            return LayerAttention(0, q, k, self._scale, self._softcap, self._window)
        made = self._look_up(ids)
        group = self._heads // self.kv_heads
        q = made.q[:, kv_heads.start * group : kv_heads.stop * group]
        return replace(made, q=q if rows is None else q[:, :, rows], k=made.k[:, kv_heads.start : kv_heads.stop])

    def shares(self, queries: int) -> list[range]:
        """All key heads, in the fewest ranges for `queries_keys` whose `queries` queries take `QUERY_BYTES` at most.

        It is one range where the layer's own code makes all heads at once.

        Args:
            queries: queries of a head, of all windows of a batch together.
        """
        each = queries * (self._heads // self.kv_heads) * self._head_dim * self._dtype.itemsize
        most = self.kv_heads if self._turned is None else min(max(QUERY_BYTES // each, 1), self.kv_heads)
        return [range(at, min(at + most, self.kv_heads)) for at in range(0, self.kv_heads, most)]

    def describe(self) -> dict[str, Any]:
        """What a manifest records of this calculator, as plain values.

        `look_up` says what turns the looked-up rows: "kernel", or "model", its own code.
        """
        return {
            **described("first_layer", self._location, self._config, self._dtype, self.device),
            "heads": self._heads,
            "kv_heads": self.kv_heads,
            "head_dim": self._head_dim,
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "bytes_read": self._bytes_read,
            "look_up": "model" if self._turned is None else "kernel",
        }

    def _plain(self, input_ids: torch.Tensor) -> Seen:
        self._restore()
        return _observe(self._network, input_ids)

    def _look_up(self, input_ids: torch.Tensor) -> LayerAttention:
        tables, rows = self._tables_for(input_ids)
        with self._answers(self._blanks(input_ids) + [nn.functional.embedding(rows, table) for table in tables]):
            return self._plain(input_ids).attention

    @contextmanager
    def _answers(self, answers: list[torch.Tensor]) -> Iterator[None]:
        """Within the block, the entrances and then the projections give these in place of their own results."""
        stages = (*self._entrances, *self._projections)
        try:
            for stage, answer in zip(stages, answers, strict=False):
                stage.answer = answer
            yield
        finally:
            for stage in stages:
                stage.answer = None

    def _tables_for(self, input_ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Tables, one a projection, and which of their rows each token takes."""
        if not self._tables:
            tokens, rows = torch.unique(input_ids, return_inverse=True)
            blocks = [self._project(some) for some in torch.split(tokens, BLOCK)]
            return [torch.cat(parts) for parts in zip(*blocks, strict=True)], rows
        if self._missing:
            # A GPU makes all of them at once: to look which are wanted would wait for it in every call.
            on_cpu = self.device.type == "cpu"
            wanted = torch.unique(input_ids // BLOCK).tolist() if on_cpu else list(self._missing)
            for block in self._missing.intersection(wanted):
                start, stop = block * BLOCK, min((block + 1) * BLOCK, self.vocab_size)
                made = self._project(torch.arange(start, stop, device=self.device))
                for table, rows in zip(self._tables, made, strict=True):
                    table[start:stop] = rows
                self._missing.remove(block)
        return self._tables, input_ids

    def _project(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """What every projection makes of up to BLOCK tokens, (n,) → [(n, width)], computed as BLOCK rows."""
        self._plain_block(tokens)
        return [projection.taken()[0, : len(tokens)] for projection in self._projections]

    def _plain_block(self, tokens: torch.Tensor) -> LayerAttention:
        return self._plain(nn.functional.pad(tokens, (0, BLOCK - len(tokens)))[None]).attention

    def _check(self, ids: torch.Tensor, plain: LayerAttention) -> None:
        """Refuse a layer of which tables give other queries and keys than its plain forward over `ids` did."""
        tabled = self._look_up(ids)
        # The same bits are expected, but a matrix library may treat the rows at a tile's edge differently; what
        # depends on context differs by far more than a few roundings.
        tolerance = 4 * torch.finfo(self._dtype).eps
        for ours, theirs in ((tabled.q, plain.q), (tabled.k, plain.k)):
            largest = float(theirs.abs().max())
            if not float((ours - theirs).abs().max()) <= tolerance * largest:
                raise UnsupportedModel(
                    f"In the first layer of {self._location.name} ('{self._config.model_type}') queries and keys "
                    "depend on more than the token and its position, so tables cannot give them. Use another "
                    "model, or --method ladm, which runs the whole model."
                )

    def _make_turned(self, sample: torch.Tensor, projected: list[torch.Tensor]) -> TurnedTables:
        """Tables of the whole vocabulary for the kernel, in blocks as above, to be checked on a projected sample."""
        q, k = (
            torch.empty(self.vocab_size, heads, self._head_dim, dtype=self._dtype, device=self.device)
            for heads in (self._heads, self.kv_heads)
        )
        with unturned(self._attention):
            for start in range(0, self.vocab_size, BLOCK):
                stop = min(start + BLOCK, self.vocab_size)
                made = self._plain_block(torch.arange(start, stop, device=self.device))
                q[start:stop] = made.q[0, :, : stop - start].transpose(0, 1)
                k[start:stop] = made.k[0, :, : stop - start].transpose(0, 1)

        def turns(length: int) -> Turns | None:
            self._restore()
            ids = torch.zeros((), dtype=torch.int64, device=self.device).expand(1, length)
            slides = self._window is not None and self._window < length
            with self._answers(self._blanks(ids)):
                return read_turns(self._attention, lambda: run(self._network, ids, _never), length, masked=slides)

        def at(start: int) -> LayerAttention:
            self._restore()
            positions = torch.arange(start, start + sample.shape[1], device=self.device)
            with self._answers(self._blanks(sample) + projected):
                return _observe(self._network, sample, positions).attention

        return TurnedTables(q, k, Layer(turns, sample, at))

    def _blanks(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        return [entrance.blank(input_ids) for entrance in self._entrances]


class _Stage(nn.Module):
    """A step on the way from token to query and key, that gives `answer` in place of its own result when it has one.

    "entrance": up to the normed embedding, answered by a blank. "projection": a linear map of the normed embedding,
    answered from its table. "unused": one that queries and keys do not depend on, always answered by zeros.
    """

    def __init__(self, inner: nn.Module, role: str, width: int) -> None:
        super().__init__()
        self.inner, self.role, self.width = inner, role, width
        self.answer: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.inner.parameters()).dtype

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if self.answer is not None:
            return self.answer
        if self.role == "unused":
            return self.blank(given[..., 0])
        made: torch.Tensor = self.inner(given)
        self._made = made if self.role == "projection" else None
        return made

    def blank(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros (batch, length, width) for a `like` of (batch, length), that take no memory."""
        return torch.zeros((), dtype=self.dtype, device=like.device).expand(*like.shape, self.width)

    def taken(self) -> torch.Tensor:
        """The result of the last own computation, handed out once."""
        assert self._made is not None
        made, self._made = self._made, None
        return made


@dataclass(frozen=True, slots=True)
class _Trace:
    weights: list[str]  # names of the parameters that queries and keys depend on
    roles: dict[str, tuple[str, int]]  # module name → role and width of its output
    attention: str  # name of the module that calls the attention


def _observe(network: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor | None = None) -> Seen:
    """The first layer's attention in a forward over whole windows, which ends there.

    Args:
        positions: (length,) of the tokens; by default 0, 1, ….
    """
    calls: list[Seen] = []

    def observer(seen: Seen) -> torch.Tensor:
        calls.append(seen)
        raise Enough

    # Models read their positions under either name.
    elsewhere = {} if positions is None else {"position_ids": positions[None], "cache_position": positions}
    with observed(observer), suppress(Enough):
        network(input_ids=input_ids, use_cache=False, **elsewhere)
    if not calls or calls[0].attention.layer != 0:
        raise UnsupportedModel("The model's first layer has no attention that can be observed. Use another model.")
    return calls[0]


def _never(seen: Seen) -> torch.Tensor:
    raise AssertionError(f"layer {seen.attention.layer} was reached in a forward that ends before it")


def _trace(network: nn.Module, config: Any, device: torch.device) -> _Trace:
    """Follow two tokens to the first layer's queries and keys."""
    calls: list[tuple[str, nn.Module, Any, Any]] = []
    entered: list[str] = []  # the last one is where the forward is

    def leave(name: str, module: nn.Module, given: Any, made: Any) -> None:
        entered.pop()
        if any(True for _ in module.parameters(recurse=False)):
            calls.append((name, module, given, made))

    hooks: list[RemovableHandle] = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)))
        hooks.append(module.register_forward_hook(functools.partial(leave, name)))
    try:
        with torch.enable_grad():
            attention = _observe(network, torch.zeros(1, 2, dtype=torch.int64, device=device)).attention
    finally:
        for hook in hooks:
            hook.remove()
    needed = _leaves(attention.q, attention.k)
    weights = [name for name, parameter in network.named_parameters() if id(parameter) in needed]
    start = next((i for i, (_, module, _, _) in enumerate(calls) if isinstance(module, nn.Linear)), None)
    if start is None:
        raise UnsupportedModel(
            f"The first layer of the architecture '{config.model_type}' has no linear projections of a known kind, "
            "so tables of it cannot be made. Use another model."
        )
    normed = calls[start][2][0]
    roles = {name: ("entrance", made.shape[-1]) for name, _, _, made in calls[:start]}
    for name, module, given, made in calls[start:]:
        if isinstance(module, nn.Linear) and given and given[0] is normed:
            used = any(id(parameter) in needed for parameter in module.parameters())
            roles[name] = ("projection" if used else "unused", made.shape[-1])
    return _Trace(weights, roles, entered[-1])


def _leaves(*tensors: torch.Tensor) -> set[int]:
    """The ids of the parameters that `tensors` were computed from, out of the recorded graph."""
    leaves: set[int] = set()
    visited: set[Any] = set()
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors]
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes.extend(parent for parent, _ in node.next_functions)
    return leaves


def _place(network: nn.Module, weights: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put `weights` and all buffers on `device`; every other parameter becomes zeros that take no memory."""
    for name, module in network.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            read = weights.get(f"{name}.{leaf}" if name else leaf)
            if read is None:
                value = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            elif read.shape != parameter.shape:
                raise ModelError(
                    f"The checkpoint's '{name}.{leaf}' has the shape {tuple(read.shape)} and its config.json says "
                    f"{tuple(parameter.shape)}: they do not belong together."
                )
            else:
                value = read.to(device=device, dtype=parameter.dtype)
            setattr(module, leaf, nn.Parameter(value))
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, buffer.to(device))


def _read(checkpoint: Checkpoint, names: list[str]) -> dict[str, torch.Tensor]:
    prefix = checkpoint.prefix_of(names)
    if prefix is None:
        raise ModelError(
            f"{checkpoint.location.name} does not hold the first layer under the names that its architecture "
            f"gives it (looked for …{names[0]} and {len(names) - 1} more). Use a checkpoint saved by transformers."
        )
    read = checkpoint.read(prefix + name for name in names)
    return {name: read[prefix + name] for name in names}


def _install(network: nn.Module, trace: _Trace) -> None:
    for name, (role, width) in trace.roles.items():
        parent, _, child = name.rpartition(".")
        stage = _Stage(network.get_submodule(name), role, width)
        setattr(network.get_submodule(parent), child, stage)
