"""Calibrated far focus: a few chosen heads, weighed so that coherent windows stand above controls of every kind.

LongAttn and LADM average over all heads, of which most see no long-range dependency and some are drawn by tables of
numbers. A calibration (`longsift calibrate`) says which heads of which layers to look at and how to weigh them; the
forward stops at the deepest of these layers, and the others' statistics are never computed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from longsift.errors import ModelError, UsageError
from longsift.rules import ScoreRule, Term

if TYPE_CHECKING:
    import torch

    from longsift.calculators import LayerAttention
    from longsift.calculators.full import FullModel

log = logging.getLogger(__name__)

STATISTICS = ("far", "weighted", "sink", "spread", "variation", "peak", "near", "unsteady")
FAR = 0.25  # a key is far when it is at least this share of the window behind its query, as in LongAttn


def head_statistics(focus: torch.Tensor) -> torch.Tensor:
    """What each head does with its far past, from its attention mass between spans.

    With p[j, c] the mean probability that a token of query span j gives to all of span c, over the query spans j
    that have at least two far spans c (c ≥ 1, since span 0 is the attention sink, and (j - c) ≥ J/4):

    - `far`: mean over j of Σ p[j, far c];
    - `weighted`: mean over j of Σ p[j, c ≥ 1] · (j - c)/J;
    - `sink`: mean over j of p[j, 0];
    - `spread`: mean over j of the standard deviation of p[j, far c] over c;
    - `variation`: mean over j of that deviation over the mean of p[j, far c];
    - `peak`: mean over j of the largest p[j, far c];
    - `near`: mean over j of p[j, j];
    - `unsteady`: standard deviation over j of Σ p[j, far c].

    Args:
        focus: `span_focus(..., denominator="causal")` of all spans over the span's tokens, (heads, J, J): rows are
            probabilities, so divide the masses by the span.

    Returns:
        (heads, len(STATISTICS)), float64.

    Raises:
        ValueError: fewer than 8 spans.
    """
    import torch

    n_spans = focus.shape[-1]
    if n_spans < 8:
        raise ValueError(f"head statistics need at least 8 spans; got {n_spans}")
    p = focus.double()
    reach = math.ceil(FAR * n_spans)
    first = reach + 2  # the first query span with two far spans: 1 and 2
    span = torch.arange(n_spans, device=p.device)
    gap = span[first:, None] - span
    p = p[:, first:]
    inside = (gap >= 0) & (span >= 1)
    far = (gap >= reach) & (span >= 1)
    count = far.sum(-1)  # (query spans,)
    far_mass = p.where(far, 0.0)
    total = far_mass.sum(-1)  # (heads, query spans)
    mean = total / count
    deviation = (far_mass - mean[..., None]).where(far, 0.0).square().sum(-1)
    spread = (deviation / (count - 1)).sqrt()
    columns = (
        total.mean(-1),
        (p.where(inside, 0.0) * gap.clamp(min=0)).sum(-1).mean(-1) / n_spans,
        p[..., 0].mean(-1),
        spread.mean(-1),
        (spread / mean.clamp(min=1e-12)).mean(-1),
        far_mass.amax(-1).mean(-1),
        p.diagonal(first, -2, -1).mean(-1),
        total.std(-1),
    )
    return torch.stack(columns, -1)


FORMAT = "longsift-calibration/1"
SMALLEST = 1e-6  # added before the logarithm, so that a statistic of 0 has one
LARGEST_Z = 4.0  # beyond this, a standardised statistic says no more than "far out"
EMBEDDED = Path(__file__).parent.parent / "calculators" / "embedded" / "calibration.json"


@dataclass(frozen=True, slots=True)
class Feature:
    """One statistic of one head and its part in the score: `weight · z + square · z²`.

    z is `(log(x + SMALLEST) - mean) / scale`, clipped to ±LARGEST_Z; `mean` and `scale` are those of coherent windows.
    """

    layer: int
    head: int
    statistic: str
    mean: float
    scale: float
    weight: float
    square: float = 0.0


@dataclass(frozen=True, slots=True)
class Fit:
    """A score for windows of one length.

    Attributes:
        window: tokens in the windows that it was made from.
        span: tokens in a span.
        features: what is added up.
        figures: how well it separates windows of documents that it did not see, for people to read.
    """

    window: int
    span: int
    features: tuple[Feature, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> dict[int, list[int]]:
        """The chosen heads by layer, in order."""
        chosen: dict[int, set[int]] = {}
        for feature in self.features:
            chosen.setdefault(feature.layer, set()).add(feature.head)
        return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration file: the model that it was made with, and a fit a window length.

    Attributes:
        model: the calculator's `FullModel.identity()`: name, revision, fingerprint, rope_theta.
        fits: in order of their windows.
    """

    model: Mapping[str, Any]
    fits: tuple[Fit, ...]

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a file of `longsift calibrate`.

        Raises:
            UsageError: there is none, or it is no calibration.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is '{content['format']}', not '{FORMAT}'")
            fits = [
                Fit(fit["window"], fit["span"], tuple(Feature(**each) for each in fit["features"]), fit["figures"])
                for fit in content["fits"]
            ]
            if not fits:
                raise ValueError("it holds no fit")
            if not all(fit.features and {each.statistic for each in fit.features} <= set(STATISTICS) for fit in fits):
                raise ValueError("a fit without features, or with an unknown statistic")
            return cls(content["model"], tuple(sorted(fits, key=lambda fit: fit.window)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"'{path}' is no calibration ({error}). Make one: longsift calibrate CORPUS --model M -o FILE."
            ) from error

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        from longsift import __version__
        from longsift.shards import write_json

        fits = [asdict(fit) for fit in self.fits]
        write_json(path, {"format": FORMAT, "longsift": __version__, "model": dict(self.model), "fits": fits})

    def fit_for(self, length: int) -> Fit:
        """The fit whose window is nearest to `length` in proportion."""
        return min(self.fits, key=lambda fit: abs(math.log(fit.window / length)))

    def check_model(self, identity: Mapping[str, Any]) -> None:
        """Refuse a calculator, as `FullModel.identity` has it, that the calibration was not made with.

        Raises:
            UsageError: other weights or another RoPE base.
        """
        for key, what in (("fingerprint", "set of weights"), ("rope_theta", "RoPE base")):
            if self.model[key] != identity[key]:
                made = "@".join(filter(None, (self.model["name"], self.model["revision"])))
                name = identity["name"]
                raise UsageError(
                    f"The calibration was made with '{made}', and '{name}' has another {what}. Make one for it "
                    f"(longsift calibrate CORPUS --model {name} -o FILE) and give it with --calibration FILE, or use "
                    "--method longattn or ladm, which need none."
                )


def weigh(features: tuple[Feature, ...], values: torch.Tensor) -> torch.Tensor:
    """The score that features add up to.

    Args:
        features: of a fit.
        values: their statistics, float64 (..., len(features)).

    Returns:
        float64 (...).
    """
    mean, scale, weight, square = _coefficients(features, values.device)
    z = (((values + SMALLEST).log() - mean) / scale).clamp(-LARGEST_Z, LARGEST_Z)
    score: torch.Tensor = (weight * z + square * z * z).sum(-1)
    return score


# On the device once and for good: a copy for every window would wait for the GPU, and recorded forwards read these.
@functools.cache
def _coefficients(features: tuple[Feature, ...], device: torch.device) -> torch.Tensor:
    import torch

    rows = [(each.mean, each.scale, each.weight, each.square) for each in features]
    return torch.tensor(rows, dtype=torch.float64, device=device).T.contiguous()


@functools.cache
def _places(places: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(places, device=device).T.contiguous()


def head_keys(attention: LayerAttention, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of the given heads and the keys they use, each (batch, len(heads) or its kv heads, length, head_dim)."""
    q, k = attention.q, attention.k
    if list(heads) == list(range(q.shape[1])):
        return q, k
    group = q.shape[1] // k.shape[1]
    return _heads_of(q, heads), _heads_of(k, [head // group for head in heads])


def _heads_of(x: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """`x[:, heads]` of ascending heads, as a view where they are evenly spaced.

    A list as an index would be copied to the GPU for every layer, and the host would wait for it.
    """
    import torch

    first, step = heads[0], heads[1] - heads[0] if len(heads) > 1 else 1
    if any(head != first + i * step for i, head in enumerate(heads)):
        return torch.cat([x[:, head : head + 1] for head in heads], 1)
    if step == 0:
        return x[:, first : first + 1].expand(-1, len(heads), -1, -1)
    return x[:, first : heads[-1] + 1 : step]


@dataclass(frozen=True)
class Calibrated:
    """A regularised linear score of a few heads' far focus, trained to put coherent windows above controls.

    Args:
        calibration: file of `longsift calibrate`; by default the one of the embedded calculator.
        digest: of the file's content, as a manifest has it; a file that has changed since is refused.
    """

    calibration: str | None = None
    digest: str | None = field(default=None, metadata={"flag": False})

    name: ClassVar[str] = "calibrated"
    calculator: ClassVar[Literal["full"]] = "full"
    citation: ClassVar[str] = (
        "Far focus of heads chosen on paired controls (longsift), after LongAttn (arXiv:2502.16860) and LADM "
        "(arXiv:2503.02502)"
    )

    def __post_init__(self) -> None:
        if self.digest is None:
            try:
                content = self.path.read_bytes()
            except OSError as error:
                raise UsageError(f"--calibration: {error}. Make one with longsift calibrate.") from error
            object.__setattr__(self, "digest", hashlib.sha256(content).hexdigest()[:16])

    @property
    def path(self) -> Path:
        """The calibration file."""
        return EMBEDDED if self.calibration is None else Path(self.calibration)

    @functools.cached_property
    def loaded(self) -> Calibration:
        """The calibration itself.

        Raises:
            UsageError: the file is gone, is none, or is another than when the digest was taken.
        """
        if type(self)(self.calibration).digest != self.digest:
            raise UsageError(f"The calibration '{self.path}' has changed. Score again with --overwrite.")
        return Calibration.read(self.path)

    def layers(self) -> tuple[int, ...]:
        """Every layer that some fit looks at."""
        return tuple(sorted({feature.layer for fit in self.loaded.fits for feature in fit.features}))

    def columns(self) -> tuple[pa.Field, ...]:
        return (
            pa.field("calibrated", pa.float64()),
            pa.field("far_focus", pa.float64()),  # mean over the chosen heads of their far mass without the sink
        )

    def shortest(self) -> int:
        return 8 * min(fit.span for fit in self.loaded.fits)

    def measure(self, calculator: FullModel, input_ids: torch.Tensor) -> dict[str, Any]:
        import torch

        from longsift.attention import span_focus

        length = input_ids.shape[1]
        fit = self.loaded.fit_for(length)
        if length < 8 * fit.span:
            raise ModelError(f"shorter than the {8 * fit.span:,} tokens that the calibration needs")
        if fit.window != length:
            _warn_of_length(fit.window, length)
        heads = fit.heads
        row = {place: i for i, place in enumerate((layer, head) for layer in heads for head in heads[layer])}
        places = tuple((row[each.layer, each.head], STATISTICS.index(each.statistic)) for each in fit.features)

        def reduce(layer: LayerAttention) -> torch.Tensor:
            q, k = head_keys(layer, heads[layer.layer])
            return span_focus(q, k, fit.span, scale=layer.scale, softcap=layer.softcap, denominator="causal")[0]

        def columns(window: torch.Tensor) -> dict[str, torch.Tensor]:
            focus = calculator.reduce(window, reduce, layers=tuple(heads))
            # The statistics are many small operations: once for all heads.
            statistics = head_statistics(torch.cat([focus[layer] for layer in heads]) / fit.span)
            chosen = statistics[tuple(_places(places, statistics.device))]
            return {"calibrated": weigh(fit.features, chosen), "far_focus": statistics[:, 0].mean()}

        return calculator.each_window(input_ids, columns, key=self)

    def rule(self) -> ScoreRule:
        return ScoreRule(terms=(Term("calibrated", 1.0), Term("far_focus", 0.0)), normalize="none")


@functools.lru_cache(maxsize=64)  # once a length, not once a window
def _warn_of_length(window: int, length: int) -> None:
    log.warning("the calibration was made for windows of %d tokens, not %d; see longsift calibrate", window, length)
