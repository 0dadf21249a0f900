"""Score rules: how a method's columns become one score within a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Term:
    """A column of the scores table and its weight in the score.

    Args:
        column: its name.
        weight: its factor; 0 for one that reports show beside the score and that is no part of it.
        each: the column holds a list of numbers, as many in every window: the rule's N is taken of each of them by
            itself, and the term is the mean of these.
    """

    column: str
    weight: float
    each: bool = False


@dataclass(frozen=True)
class ScoreRule:
    """How the columns become one score: Σ weight · N(column).

    Args:
        terms: the columns and their weights.
        normalize: N, taken over the measured windows of a group: "zscore" with the population standard
            deviation, "minmax" to [0, 1], or "none" for the raw value. A constant column gives 0 under the
            first two.
    """

    terms: tuple[Term, ...]
    normalize: Literal["zscore", "minmax", "none"]

    def describe(self) -> str:
        """The rule as a formula, such as "Z(dependency_strength) − 0.5·Z(variance)" or "mean(Z(cds_layers))"."""
        shapes = {"zscore": "Z({})", "minmax": "minmax({})", "none": "{}"}
        formula = ""
        for term in self.terms:
            if term.weight == 0:
                continue
            sign = " − " if term.weight < 0 else " + "
            factor = "" if abs(term.weight) == 1 else f"{abs(term.weight):g}·"
            value = shapes[self.normalize].format(term.column)
            formula += sign + factor + (f"mean({value})" if term.each else value)
        return formula.removeprefix(" + ").strip()
