"""One document under the lens: where in it tokens draw on their far past, as numbers and as a page."""

from __future__ import annotations

from longsift.inspection.maps import DependencyMap, FarCurve, dependency_map

__all__ = ["DependencyMap", "FarCurve", "dependency_map"]
