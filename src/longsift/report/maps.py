"""Small dependency maps of the windows that a report shows, measured while there is time and kept in the run folder."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from longsift.errors import LongsiftError
from longsift.report.shelves import Place
from longsift.selection import RankedWindow
from longsift.tables import publish

if TYPE_CHECKING:
    from longsift.inspection.inspector import Inspector

log = logging.getLogger(__name__)

_CELLS = 48  # of a map, in each direction, at most
_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # of the windows table
        pa.field("tokens", pa.int32(), nullable=False),  # of a cell, in each direction
        pa.field("side", pa.int32(), nullable=False),  # cells
        pa.field("levels", pa.binary(), nullable=False),  # of the lower triangle (`longsift.inspection.maps.quantise`)
    ]
)


@dataclass(frozen=True)
class SmallMap:
    """The lower triangle of `side` × `side` cells, row by row, a byte each; a cell is `tokens` × `tokens`."""

    tokens: int
    side: int
    levels: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.levels).decode("ascii")


def small_maps(
    out: Path, manifest: Mapping[str, Any], windows: Path, shown: Sequence[RankedWindow], seconds: float
) -> dict[Place, SmallMap]:
    """Maps of some windows: those that an earlier report measured, and others for so many seconds, the first first.

    A calculator that cannot be loaded, or does not see a whole window, leaves windows without a map, and a warning.

    Args:
        out: the run's folder, in whose `maps` they are kept.
        windows: folder of the windows table.
        seconds: 0 measures none.
    """
    path = out / "maps" / f"{_identity(manifest)}.parquet"
    known = _read(path)
    wanted = [window for window in shown if (window.shard, window.row) not in known]
    if wanted and seconds > 0:
        found = dict(_measured(out, windows, wanted, seconds))
        if found:
            known |= found
            _write(path, known)
    return {place: known[place] for window in shown if (place := (window.shard, window.row)) in known}


def in_turn(shelves: Iterable[Sequence[tuple[str, Sequence[RankedWindow]]]]) -> list[RankedWindow]:
    """The windows of all groups' shelves: first the first of each group, then the second, and so on."""
    rows = [[window for _, listed in some for window in listed] for some in shelves]
    return [row[i] for i in range(max(map(len, rows), default=0)) for row in rows if i < len(row)]


def _identity(manifest: Mapping[str, Any]) -> str:
    """A name for what the maps depend on: the windows, and what the method looks at of the calculator."""
    windows, scores = manifest["windows"], manifest["scores"]
    identity = scores.get("identity", {})
    parameters = identity.get("parameters", {})
    content = [
        windows.get("finished"),
        [scores["calculator"].get(key) for key in ("model", "revision", "layers")],
        [identity.get(key) for key in ("method", "rope_theta")],
        [parameters.get(key) for key in ("span", "denominator")],
        _CELLS,
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _read(path: Path) -> dict[Place, SmallMap]:
    if not path.exists():
        return {}
    rows = pq.read_table(path, schema=_SCHEMA).to_pylist()
    return {(row["shard"], row["row"]): SmallMap(row["tokens"], row["side"], row["levels"]) for row in rows}


def _write(path: Path, maps: Mapping[Place, SmallMap]) -> None:
    rows = [
        {"shard": shard, "row": row, "tokens": each.tokens, "side": each.side, "levels": each.levels}
        for (shard, row), each in sorted(maps.items())
    ]
    with publish(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary)


def _measured(
    out: Path, windows: Path, wanted: Sequence[RankedWindow], seconds: float
) -> Iterator[tuple[Place, SmallMap]]:
    from longsift.inspection.inspector import Inspector

    end = time.monotonic() + seconds
    try:
        inspector = Inspector.of_run(out)
    except LongsiftError as error:
        log.warning("the report has no dependency maps: %s", error)
        return
    longest = 0.0
    for number, window in enumerate(wanted):
        begun = time.monotonic()
        if begun + longest > end:
            log.warning(
                "%d of %d windows have no dependency map after %g s", len(wanted) - number, len(wanted), seconds
            )
            return
        try:
            found = _measure(inspector, _ids(windows, window))
        except LongsiftError as error:
            log.warning("%s has no dependency map: %s", window.window_id, error)
            continue
        longest = max(longest, time.monotonic() - begun)
        yield (window.shard, window.row), found


def _measure(inspector: Inspector, ids: npt.NDArray[np.int32]) -> SmallMap:
    from longsift.inspection.inspector import default_span
    from longsift.inspection.maps import dependency_map, pooled, quantise

    span = max(min(default_span(len(ids)), len(ids) // 8), 1)
    found = dependency_map(inspector.calculator, ids, span=span)
    together = -(-found.n_spans // _CELLS)
    shares = pooled(found.mean(), together)
    side = len(shares)
    return SmallMap(together * span, side, quantise(shares[np.tril_indices(side)]).tobytes())


def _ids(windows: Path, window: RankedWindow) -> npt.NDArray[np.int32]:
    with duckdb.connect() as database:
        (ids,) = database.execute(
            "SELECT input_ids FROM read_parquet(?, file_row_number = true) WHERE file_row_number = ?",
            [str(windows / f"{window.shard}.parquet"), window.row],
        ).fetchone() or ([],)
    return np.asarray(ids, dtype=np.int32)
