"""longsift: select long-context training data by what a language model's own attention depends on.

Public names load on first use, so that `import longsift` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longsift.attention import far_statistics, span_focus
    from longsift.errors import LongsiftError
    from longsift.pipeline import cut, report, run, score, select
    from longsift.scoring import Scorer

__version__ = "0.1.0"

__all__ = [
    "LongsiftError",
    "Scorer",
    "__version__",
    "cut",
    "far_statistics",
    "report",
    "run",
    "score",
    "select",
    "span_focus",
]

_PLACES = {
    "LongsiftError": "longsift.errors",
    "Scorer": "longsift.scoring",
    "cut": "longsift.pipeline",
    "far_statistics": "longsift.attention",
    "report": "longsift.pipeline",
    "run": "longsift.pipeline",
    "score": "longsift.pipeline",
    "select": "longsift.pipeline",
    "span_focus": "longsift.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'longsift' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
