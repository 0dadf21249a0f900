"""Selection methods: what each one measures, which columns it writes, and how they become one score.

A new method is one file in this folder and one line in `METHODS`.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import pyarrow as pa

from longsift.errors import UsageError
from longsift.rules import ScoreRule

if TYPE_CHECKING:
    import torch

METHODS: dict[str, str] = {
    "longattn": "longsift.methods.longattn:LongAttn",
    "ladm": "longsift.methods.ladm:Ladm",
    "calibrated": "longsift.methods.calibrated:Calibrated",
}


class Method(Protocol):
    """What the scoring and selection stages ask of a method; a frozen dataclass of its parameters.

    Attributes:
        name: the registry's key.
        calculator: the kind of model that it measures with.
        citation: the paper, for the data set card.
    """

    name: ClassVar[str]
    calculator: ClassVar[Literal["first_layer", "full"]]
    citation: ClassVar[str]

    def columns(self) -> tuple[pa.Field, ...]:
        """The columns that it adds to the scores table, all nullable (null where a window failed)."""
        ...

    def shortest(self) -> int:
        """The least number of tokens of a window that it can measure."""
        ...

    def measure(self, calculator: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor | list[Any]]:
        """Measure windows of one length; every window's values are the same bits as if it were measured alone.

        It does not wait for a GPU: results stay there, and the Scorer copies them while the next batch is measured.

        Args:
            calculator: the model, as the attribute `calculator` says.
            input_ids: (batch, length) int64, on the calculator's device, all within its vocabulary and at least
                `shortest()` tokens each.

        Returns:
            One entry a column: a floating tensor whose first dimension is the batch, or a list that is the same for
            every window.

        Raises:
            ModelError: windows of this length cannot be measured.
        """
        ...

    def rule(self) -> ScoreRule:
        """How the columns become one score within a group."""
        ...


def build_method(name: str, **parameters: Any) -> Method:
    """Make the method `name` with its parameters; a parameter of None keeps the method's default.

    Raises:
        UsageError: no such method, or a parameter that it does not have or cannot take.
    """
    if name not in METHODS:
        raise UsageError(f"There is no method '{name}'. Choose one of: {', '.join(METHODS)}.")
    module, _, attribute = METHODS[name].partition(":")
    method = getattr(importlib.import_module(module), attribute)
    given = {key: value for key, value in parameters.items() if value is not None}
    fields = dataclasses.fields(method)
    known = {field.name for field in fields}
    foreign = sorted(set(given) - known)
    if foreign:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in foreign)
        flagged = sorted(field.name for field in fields if field.metadata.get("flag", True))
        takes = ", ".join(f"--{key.replace('_', '-')}" for key in flagged)
        why = "".join(f" {reason}" for key, reason in getattr(method, "needless", {}).items() if key in foreign)
        raise UsageError(f"{flags} does not apply to the method '{name}', which takes {takes}.{why}")
    built: Method = method(**given)
    return built


def parameters_of(method: Method) -> dict[str, Any]:
    """The parameters of a method as plain values, for a manifest; `build_method` takes them back."""
    return dataclasses.asdict(method)  # type: ignore[call-overload, no-any-return]
