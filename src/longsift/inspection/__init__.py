"""One document under the lens: where in it passages draw on their far past, as numbers and as a page."""

from __future__ import annotations

from longsift.inspection.inspector import Inspection, Inspector, inspect, inspection_page, summary
from longsift.inspection.maps import DependencyMap, FarCurve, dependency_map
from longsift.inspection.subjects import Subject, read_subject, window_of_run

__all__ = [
    "DependencyMap",
    "FarCurve",
    "Inspection",
    "Inspector",
    "Subject",
    "dependency_map",
    "inspect",
    "inspection_page",
    "read_subject",
    "summary",
    "window_of_run",
]
