"""What a trained calculator's folder says of itself: a card for the Hugging Face Hub and a plot of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
import transformers
import yaml

from longsift import __version__
from longsift.calculators.interface import rope_of
from longsift.tables import publish

if TYPE_CHECKING:
    from longsift.training.calculator import Plan

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 720, 320, 56, 40, 16  # of the plot, in pixels


def write_card(
    out: Path,
    plan: Plan,
    result: Mapping[str, Any],
    counts: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    step_tokens: int,
) -> None:
    """Write `out`/README.md and `out`/loss.svg.

    Args:
        result: of the run, as it is returned.
        counts: of the training windows.
        history: the Trainer's log.
        step_tokens: tokens a step.
    """
    options = plan.options
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["longsift", "ladm", "long-context", "attention"],
    }
    if options.model is not None and not Path(options.model).exists() and options.model != "embedded":
        front["base_model"] = options.model.partition("@")[0]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        name=out.resolve().name,
        options=options,
        kind=plan.kind,
        rate=plan.rate,
        source=options.from_scratch or plan.location.name,
        revision=plan.location.revision,
        architecture=plan.config.model_type,
        rope=rope_of(plan.config),
        step_tokens=step_tokens,
        result=result,
        counts=counts,
        longsift=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    with publish(out / "README.md") as path:
        path.write_text(text, encoding="utf-8")
    with publish(out / "loss.svg") as path:
        path.write_text(plot_losses(history, step_tokens), encoding="utf-8")


def plot_losses(history: Sequence[Mapping[str, Any]], step_tokens: int) -> str:
    """The losses of a training by tokens seen, as an SVG: a line for training, dots for validation.

    Args:
        history: log entries with `step` and `loss` or `eval_loss`, in nats a token.
    """
    curves = {
        name: [(entry["step"] * step_tokens, float(entry[name])) for entry in history if name in entry]
        for name in ("loss", "eval_loss")
    }
    points = [point for curve in curves.values() for point in curve]
    x_ticks = _ticks(0.0, max(x for x, _ in points))
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points))

    def place_x(x: float) -> float:
        return _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_WIDTH - _LEFT - _EDGE)

    def place_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _BOTTOM - _EDGE)

    template = files(__package__).joinpath("loss.svg.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _EDGE,
        floor=_HEIGHT - _BOTTOM,
        x_ticks=[(place_x(x), _short(x)) for x in x_ticks],
        y_ticks=[(place_y(y), f"{y:g}") for y in y_ticks],
        curves={name: [(place_x(x), place_y(y)) for x, y in curve] for name, curve in curves.items()},
    )


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values that span low to high, about `count` of them, at least two."""
    rough = max(high - low, 1e-3) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    begin, end = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(i * step, 10) for i in range(begin, end + 1)]


def _short(tokens: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"
