"""A calculator that is loaded once, and the windows that are looked at with it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.errors import InputError, ModelError, UsageError
from longsift.inspection.maps import DependencyMap, dependency_map
from longsift.inspection.page import HEAD_BYTES, render_page, triangle
from longsift.inspection.subjects import Subject, passages, read_subject, window_of_run
from longsift.options import InspectOptions, ModelOptions
from longsift.pieces import DEFAULT_WINDOW, load_tokenizer
from longsift.scoring import parse_layers, resolve_device, resolve_dtype
from longsift.shards import RunFolder
from longsift.tables import publish
from longsift.windows import WindowTokenizer

SPAN = 128  # tokens, LADM's
MOST_SPANS = 256  # of a window, when the span is not given; a page has a row of pixels for each
LARGEST_MAP = 512  # spans that a page can still show
FEWEST_SPANS = 4
_UNSAFE = re.compile(r"[^\w.-]+")  # in the name of a file
_LONGEST_NAME = 100
FAR = 1024  # tokens: context from at least so far back counts as far

Shares = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Inspection:
    """What was measured of a window, and its text.

    Attributes:
        subject: the window.
        map: what its spans draw on.
        texts: (1 + spans) what precedes the first span, and the text of each.
        calculator: as `describe()` of the calculator says.
        decoded: the texts are made from token ids, since it is not known where in the text the tokens lie.
    """

    subject: Subject
    map: DependencyMap
    texts: list[str]
    calculator: dict[str, Any]
    decoded: bool

    @property
    def far(self) -> int:
        """Spans from which on context is far: of `FAR` tokens, or a quarter of a shorter window; a power of 2."""
        return int(2 ** math.floor(math.log2(max(min(FAR // self.map.span, self.map.n_spans // 4), 1))))

    def numbers(self, top: int = 5) -> dict[str, Any]:
        """Everything but the text as plain values; shares are means over the measured layers.

        Args:
            top: sources of a passage, at most.
        """
        shares, starts = self.map.mean(), self.map.starts().tolist()
        far = far_shares(shares, self.far)
        curve = self.map.curve
        return {
            "name": self.subject.name,
            "tokens": self.map.length,
            "span": self.map.span,
            "layers": list(self.map.layers),
            "denominator": self.map.denominator,
            "far_tokens": self.far * self.map.span,
            "far_share": float(far.mean()),
            "dependency_strength": curve and curve.strength,
            "dependency_distance": curve and curve.distance,
            "passages": [
                {
                    "passage": i,
                    "start": start,
                    "far_share": float(far[i]),
                    "sources": [
                        {"passage": c, "start": starts[c], "share": share} for c, share in sources(shares, i, top)
                    ],
                }
                for i, start in enumerate(starts)
            ],
        }

    def page(self) -> str:
        """The page of this window: one HTML file that needs nothing else."""
        return render_page(self.subject, self.map, self.texts, self.calculator, far=self.far, decoded=self.decoded)


def default_span(length: int) -> int:
    """Tokens of a span in a window of `length`: 128, or as often twice that as `MOST_SPANS` ask for."""
    span = SPAN
    while length // span > MOST_SPANS:
        span *= 2
    return span


def far_shares(shares: Shares, far: int) -> npt.NDArray[np.float64]:
    """What each span draws from spans at least `far` before it, the first span (the attention sink) left out, (J,)."""
    total: npt.NDArray[np.float64] = np.tril(shares.astype(np.float64), -far)[:, 1:].sum(1)
    return total


def sources(shares: Shares, passage: int, top: int) -> list[tuple[int, float]]:
    """The earlier spans that a span draws on, most first, with their shares; the first one, the sink, left out."""
    row = shares[passage, 1:passage]
    order = np.argsort(-row, kind="stable")[:top]
    return [(int(c) + 1, float(row[c])) for c in order]


class Inspector:
    """A calculator and its tokenizer, loaded once for any number of windows, one at a time.

    Raises:
        ModelError: the calculator cannot be loaded.
        UsageError: options that cannot work.
    """

    def __init__(self, model: ModelOptions = ModelOptions(), options: InspectOptions = InspectOptions()) -> None:
        self.model, self.options = model, options
        self.device = resolve_device(options.device)
        self._layers = parse_layers(options.layers)
        loading: dict[str, Any] = {
            "revision": model.revision,
            "device": self.device,
            "dtype": resolve_dtype(options.dtype),
            "rope_theta": options.rope_theta,
            "trust_remote_code": model.trust_remote_code,
        }
        name = model.model or "embedded"
        self.calculator: FirstLayer | FullModel
        with self._on_device():
            if self._layers == (0,):  # of which four tensors are read, whatever the model's size
                self.calculator = FirstLayer.load(name, **loading)
            else:
                self.calculator = FullModel.load(name, layers=self._layers, **loading)

    @classmethod
    def of_run(
        cls, run: Path | str, model: ModelOptions = ModelOptions(), options: InspectOptions = InspectOptions()
    ) -> Self:
        """With the calculator that a run's windows were scored with, or else cut for, where none is given.

        What the method looked at is looked at here: the first layer for longattn, ladm's layers, span and denominator.

        Raises:
            OutputError: the run has no finished windows.
            UsageError: a calculator whose tokenizer is another.
        """
        folder = RunFolder(run)
        windows = folder.section("windows")
        identity = folder.manifest().get("scores", {}).get("identity", windows["identity"])
        if model.model is None:
            revision = model.revision or identity["revision"]
            model = dataclasses.replace(model, model=identity["model"], revision=revision)
            options = _as_scored(options, identity)
        inspector = cls(model, options)
        known = windows["tokenizer"]
        if known is not None and (inspector.tokenizer is None or inspector.tokenizer.fingerprint != known):
            raise UsageError(
                f"The windows of {run} were cut with the tokenizer of '{windows['identity']['model']}', which "
                f"'{model.model}' does not share: leave --model out, or inspect the document's file."
            )
        return inspector

    @functools.cached_property
    def tokenizer(self) -> WindowTokenizer | None:
        """The calculator's; None for one that has none, which can look at windows of ids."""
        try:
            return load_tokenizer(self.model.model or "embedded", self.model.revision, self.model.trust_remote_code)
        except ModelError:
            return None

    def read(self, source: str) -> Subject:
        """A window of a file, or of standard input ("-"); see `longsift.inspection.subjects.read_subject`."""
        asked = self.options
        window = asked.window or min(DEFAULT_WINDOW, self.calculator.max_length or DEFAULT_WINDOW)
        return read_subject(
            source,
            self.tokenizer,
            window,
            document=asked.document,
            index=asked.index,
            text_key=asked.text_key,
            id_key=asked.id_key,
        )

    def look(self, subject: Subject) -> Inspection:
        """Measure a window.

        Raises:
            InputError: it is too short.
            UsageError: a span with which the page would be too large.
            ModelError: it cannot be measured.
        """
        length = len(subject.input_ids)
        span = self.options.span or default_span(length)
        if length < FEWEST_SPANS * span:
            raise InputError(
                f"{subject.name} has {length:,} tokens, too few for {FEWEST_SPANS} passages of {span}: take --span "
                f"{max(length // 16, 1)}, or a longer text."
            )
        if length // span > LARGEST_MAP:
            raise UsageError(
                f"{length:,} tokens are {length // span:,} passages of {span}, and a page shows {LARGEST_MAP}: take "
                f"--span {math.ceil(length / LARGEST_MAP)} or more."
            )
        calculator = self.calculator.describe()
        layers = (0,) if isinstance(self.calculator, FirstLayer) else self.calculator.global_layers(length)
        n_maps = len(layers) * calculator["heads"]
        with self._on_device():
            found = dependency_map(
                self.calculator,
                subject.input_ids,
                span=span,
                layers=layers,
                heads=layers if n_maps * triangle(length // span) <= HEAD_BYTES else (),
                denominator=self.options.denominator or "causal",
                curve=True,
            )
        return Inspection(
            subject,
            found,
            passages(subject, found.starts(), self.tokenizer),
            calculator,
            decoded=subject.text is None or subject.cuts is None,
        )

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _as_scored(options: InspectOptions, identity: dict[str, Any]) -> InspectOptions:
    """The options, with what the run was scored with in place of what was not asked for."""
    method = identity.get("method")
    parameters = identity.get("parameters", {})
    layers = identity.get("layers")
    scored: dict[str, Any] = {"rope_theta": identity.get("rope_theta")}
    if method == "longattn":
        scored["layers"] = "0"
    if method == "ladm":
        scored |= {"span": parameters["span"], "denominator": parameters["denominator"]}
        scored["layers"] = layers and ",".join(map(str, layers))
    missing = {name: value for name, value in scored.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **missing)


def inspect(
    source: str,
    out: Path | None = None,
    model: ModelOptions = ModelOptions(),
    options: InspectOptions = InspectOptions(),
    *,
    run: Path | None = None,
) -> dict[str, Any]:
    """Measure one window and write its page.

    Args:
        source: a file of text or documents, "-" for text on standard input, or, with `run`, a window_id.
        out: the page; by default NAME.inspect.html in the working folder.
        run: folder of the run that has the window.

    Returns:
        `Inspection.numbers()`, and the page's path.

    Raises:
        LongsiftError: as `Inspector`, its `read` and `look`, and `window_of_run` raise.
    """
    if run is None:
        inspector = Inspector(model, options)
        subject = inspector.read(source)
    else:
        if options.document is not None or options.window is not None:
            raise UsageError("--document and --window are for files; a run's window is taken as it is.")
        inspector = Inspector.of_run(run, model, options)
        subject = window_of_run(run, source, inspector.tokenizer, index=options.index)
    inspection = inspector.look(subject)
    path = out or Path(_UNSAFE.sub("_", subject.name)[-_LONGEST_NAME:].strip("._") + ".inspect.html")
    with publish(path) as temporary:
        temporary.write_text(inspection.page(), encoding="utf-8")
    return inspection.numbers() | {"page": str(path)}


def summary(numbers: dict[str, Any], top: int = 5) -> dict[str, Any]:
    """What a terminal shows of `inspect`'s result: the facts, and the passages that draw most on far context."""
    passages = sorted(numbers["passages"], key=lambda passage: -float(passage["far_share"]))[:top]
    rows = [
        {
            "passage": passage["passage"],
            "from token": passage["start"],
            "far_share": passage["far_share"],
            "draws on": ", ".join(
                f"{source['passage']} ({100 * source['share']:.2g} %)" for source in passage["sources"]
            ),
        }
        for passage in passages
    ]
    facts = {key: value for key, value in numbers.items() if key not in ("passages", "page", "layers")}
    layers = ", ".join(map(str, numbers["layers"]))
    return facts | {"layers": layers, "passages": rows, "page": numbers["page"]}


def inspection_page(run: Path | str, window_id: str, inspector: Inspector, *, index: int = 0) -> str:
    """The page of a window of a run, made with a calculator that is loaded already (`Inspector.of_run`).

    Args:
        index: which of several windows of that id.

    Raises:
        OutputError: no such window.
        ModelError: it cannot be measured.
    """
    return inspector.look(window_of_run(run, window_id, inspector.tokenizer, index=index)).page()
