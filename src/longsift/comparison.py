"""Two runs over the same windows: how alike they rank them, and on which they disagree.

Each run's windows are ranked by its own score rule, within groups and by score alone, among those that both measured.
DuckDB joins them, in bounded memory; a group at a time comes out of it as arrays of numbers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np

from longsift import ranking
from longsift.errors import OutputError, UsageError
from longsift.shards import RunFolder

SHARES = (0.05, 0.125, 0.25, 0.5)
CURVE = tuple(i / 100 for i in range(1, 101))  # shares at which the overlap is drawn
BINS = 20  # of the ranks, in each direction
_GROUPS = 24  # with a curve and with windows of most disagreement: those with most windows
_WINDOWS = 3  # of most disagreement, of a group and a direction
_MEMORY = "2GB"  # DuckDB's own limit; above it, tables and sorts spill to disk


@dataclass(frozen=True)
class Side:
    """What one of the two runs is.

    Attributes:
        folder: as it was given.
        parameters: of the method; those that are not set are left out.
        revision: of the model, or None.
        score: the rule as a formula.
        windows: measured ones, those that the other run lacks included.
        failed: windows that could not be measured.
    """

    folder: str
    method: str
    parameters: dict[str, Any]
    model: str
    revision: str | None
    dtype: str
    score: str
    windows: int
    failed: int


@dataclass(frozen=True)
class Overlap:
    """What the top share of one ranking and of the other have in common.

    Attributes:
        share: of the windows of each group, rounded up.
        kept: windows of that share, in one ranking.
        both: those of them that are in the share of the other ranking too.
        chance: share of `kept` that two unrelated rankings would have in common, on average.
    """

    share: float
    kept: int
    both: int
    chance: float

    @property
    def overlap(self) -> float:
        """Share of the kept windows that both rankings keep."""
        return self.both / self.kept


@dataclass(frozen=True)
class GroupComparison:
    """One group's two rankings.

    Attributes:
        windows: that both runs measured.
        spearman, kendall: rank correlations of the scores, ties with their mean rank (Kendall: tau-b); None for fewer
            than two windows, or where all scores of a run are equal.
        overlaps: at the shares that were asked for.
        curve: share that both keep, at the shares `CURVE`; empty but for the largest groups.
    """

    group: str
    windows: int
    spearman: float | None
    kendall: float | None
    overlaps: tuple[Overlap, ...]
    curve: tuple[float, ...]


@dataclass(frozen=True)
class Disagreement:
    """A window that the runs rank far apart; `shard` and `row` say where it stands in the windows table of B.

    Attributes:
        higher: the run that ranks it higher.
        rank_a, rank_b: among the `windows` of its group that both measured; 1 is the best.
    """

    group: str
    higher: Literal["a", "b"]
    shard: str
    row: int
    window_id: str
    n_tokens: int
    windows: int
    rank_a: int
    rank_b: int
    score_a: float
    score_b: float


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same windows.

    Attributes:
        same_table: both were scored on one windows table; otherwise windows are matched by their ids.
        windows: that both runs measured.
        only_a, only_b: windows that the other run does not have.
        unmeasured: windows of both that one of them could not measure.
        spearman, kendall: means over the groups that have one.
        overlaps, curve: over all groups together.
        heat: windows by rank as a share of their group: `heat[i][j]` counts those in bin i of `BINS` of A and j of B.
        groups: sorted by name.
        disagreements: of the largest groups, those that A ranks higher before those that B does, largest difference
            first.
    """

    a: Side
    b: Side
    same_table: bool
    windows: int
    only_a: int
    only_b: int
    unmeasured: int
    spearman: float | None
    kendall: float | None
    overlaps: tuple[Overlap, ...]
    curve: tuple[float, ...]
    heat: tuple[tuple[int, ...], ...]
    groups: tuple[GroupComparison, ...]
    disagreements: tuple[Disagreement, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; overlaps with their quotient."""
        plain = asdict(self)
        compared: tuple[Comparison | GroupComparison, ...] = (self, *self.groups)
        for each, values in zip(compared, (plain, *plain["groups"]), strict=True):
            values["overlaps"] = [asdict(part) | {"overlap": part.overlap} for part in each.overlaps]
        return plain


def compare_runs(a: Path, b: Path, shares: Sequence[float] = SHARES) -> Comparison:
    """Compare the rankings of two scored runs.

    Windows are the same that stand at the same place of one windows table, where one run was scored on the other's
    windows (`longsift score A -o B`) or both on a third's; otherwise those with the same id.

    Args:
        a, b: run folders with scores. Shards that were set aside are missing, and so counted as the other's alone.
        shares: top shares of every group at which the overlap is told, in (0, 1].

    Raises:
        UsageError: a share out of range, or twice.
        OutputError: a folder without finished scores; no window in common; windows of one id that differ in length or
            group, or an id that stands for several windows of a run.
    """
    if not shares or any(not 0 < share <= 1 for share in shares) or len(set(shares)) < len(shares):
        raise UsageError("--shares takes different shares above 0 and at most 1, such as 0.05,0.125,0.5.")
    folders = RunFolder(a), RunFolder(b)
    for folder in folders:
        folder.check_linked_windows()
    same_table = folders[0].windows.resolve() == folders[1].windows.resolve()
    with tempfile.TemporaryDirectory(prefix="longsift-compare-") as scratch:
        sides = [_rank(folder, Path(scratch) / f"{name}.parquet") for folder, name in zip(folders, "ab", strict=True)]
        config = {"memory_limit": _MEMORY, "temp_directory": f"{scratch}/spill"}
        with duckdb.connect(":memory:", config=config) as database:
            for name in "ab":
                path = ranking.quoted(f"{scratch}/{name}.parquet")
                database.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet({path})")
            only_a, only_b, unmeasured = _match(database, same_table, a, b)
            sizes = dict(database.execute('SELECT "group", count(*) FROM pairs GROUP BY 1 ORDER BY 1').fetchall())
            largest = sorted(sizes, key=lambda group: (-sizes[group], group))[:_GROUPS]
            parts = [_Part.of(database, group, shares) for group in sizes]
            disagreements = tuple(_disagreements(database, sorted(largest)))
    groups = tuple(part.comparison(shares, curve=part.group in largest) for part in parts)
    return Comparison(
        a=sides[0],
        b=sides[1],
        same_table=same_table,
        windows=sum(sizes.values()),
        only_a=only_a,
        only_b=only_b,
        unmeasured=unmeasured,
        spearman=_mean([group.spearman for group in groups]),
        kendall=_mean([group.kendall for group in groups]),
        overlaps=tuple(_together([group.overlaps[i] for group in groups]) for i in range(len(shares))),
        curve=tuple(
            sum(part.curve_both[i] for part in parts) / sum(_kept(share, part.windows) for part in parts)
            for i, share in enumerate(CURVE)
        ),
        heat=tuple(tuple(map(int, row)) for row in np.sum([part.heat for part in parts], axis=0)),
        groups=groups,
        disagreements=disagreements,
    )


def parse_shares(text: str) -> tuple[float, ...]:
    """Shares such as "0.05,0.5".

    Raises:
        UsageError: not a list of numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--shares takes shares such as 0.05,0.125,0.5, not '{text}'.") from error


def summary(comparison: Comparison) -> dict[str, Any]:
    """What the terminal shows of a comparison: facts as lines, one table with the share of each top that both keep."""
    a, b = comparison.a, comparison.b

    def row(name: str, compared: Comparison | GroupComparison) -> dict[str, Any]:
        return {
            "group": name,
            "windows": compared.windows,
            "spearman": compared.spearman,
            "kendall": compared.kendall,
            **{f"top {100 * part.share:g}%": part.overlap for part in compared.overlaps},
        }

    chance = {f"top {100 * part.share:g}%": part.chance for part in comparison.overlaps}
    return {
        "A": describe(a),
        "B": describe(b),
        "windows": comparison.windows,
        **{
            name: count
            for name, count in (
                ("only in A", comparison.only_a),
                ("only in B", comparison.only_b),
                ("not measured in one", comparison.unmeasured),
            )
            if count
        },
        "groups": [
            *(row(group.group, group) for group in comparison.groups),
            *([row("all groups", comparison)] if len(comparison.groups) > 1 else []),
            {"group": "by chance", "windows": None, "spearman": 0, "kendall": 0, **chance},
        ],
    }


def describe(side: Side) -> str:
    """A run in a line: its folder, method, parameters and model."""
    revision = f" @ {side.revision[:12]}" if side.revision else ""
    return f"{side.folder}: {', '.join([side.method, *described_parameters(side)])}; {side.model}{revision}"


def described_parameters(side: Side) -> Iterator[str]:
    """The parameters that are set, such as "alpha 0.5"."""
    for key, value in side.parameters.items():
        if not isinstance(value, dict | list):
            yield f"{key.replace('_', ' ')} {value}"


def _rank(folder: RunFolder, path: Path) -> Side:
    """Write the ranking of a run's windows by score alone."""
    from longsift.methods import build_method
    from longsift.selection import choose

    section = folder.section("scores", incomplete=True)
    identity, calculator = section["identity"], section["calculator"]
    rule = build_method(identity["method"], **identity["parameters"]).rule()
    with choose(folder.scores, rule, keep=1.0) as choice:
        choice.write_ranking(path)
        return Side(
            folder=str(folder.path),
            method=identity["method"],
            parameters={k: v for k, v in identity["parameters"].items() if v is not None and v is not False},
            model=calculator["model"],
            revision=calculator["revision"],
            dtype=calculator["dtype"],
            score=rule.describe(),
            windows=choice.windows,
            failed=choice.failed,
        )


def _match(database: Any, same_table: bool, a: Path, b: Path) -> tuple[int, int, int]:
    """Table `pairs`: the windows that both measured, ranked anew; returns how many A or B has alone, or did not."""
    if not same_table:
        for name, folder in (("a", a), ("b", b)):
            (twice,) = database.execute(
                f"SELECT min(window_id) FROM (SELECT window_id FROM {name} GROUP BY 1 HAVING count(*) > 1)"
            ).fetchone()
            if twice is not None:
                raise OutputError(
                    f"{folder} has several windows of the id '{twice}', so that they cannot be matched with another "
                    "run's. Score the windows of one run with both: longsift score A -o B."
                )
    key = 'shard, "row"' if same_table else "window_id"
    database.execute(
        f"""CREATE TABLE joined AS
            SELECT a.window_id AS id_a, b.window_id AS id_b, a."group" AS group_a, b."group" AS group_b,
                   a.n_tokens AS n_a, b.n_tokens AS n_b, b.shard, b."row",
                   a.score AS score_a, b.score AS score_b, a.rank AS rank_a, b.rank AS rank_b
            FROM a JOIN b USING ({key})"""
    )
    differing = database.execute(
        """SELECT id_a, id_b, group_a, group_b, n_a, n_b FROM joined
           WHERE (id_a, group_a, n_a) IS DISTINCT FROM (id_b, group_b, n_b) ORDER BY id_a LIMIT 1"""
    ).fetchone()
    if differing:
        id_a, id_b, group_a, group_b, n_a, n_b = differing
        raise OutputError(
            f"The runs are not of the same windows: '{id_a}' of {n_a:,} tokens in the group '{group_a}' of {a} is "
            f"'{id_b}' of {n_b:,} tokens in the group '{group_b}' of {b}. Score the windows of one run with both: "
            f"longsift score {a} -o {b} --overwrite."
        )
    of_a, of_b, both, measured = database.execute(
        """SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b), count(*), count(rank_a + rank_b) FROM joined"""
    ).fetchone()
    if not measured:
        raise OutputError(
            f"No window was measured in both {a} ({of_a:,} windows) and {b} ({of_b:,}). "
            f"Score the windows of one run with both: longsift score {a} -o {b} --overwrite."
        )
    database.execute(
        """CREATE TABLE pairs AS
           SELECT group_a AS "group", id_a AS window_id, n_a AS n_tokens, shard, "row", score_a, score_b,
                  row_number() OVER (PARTITION BY group_a ORDER BY rank_a) AS rank_a,
                  row_number() OVER (PARTITION BY group_a ORDER BY rank_b) AS rank_b
           FROM joined WHERE rank_a IS NOT NULL AND rank_b IS NOT NULL ORDER BY "group", rank_a"""
    )
    return of_a - both, of_b - both, both - measured


@dataclass(frozen=True)
class _Part:
    """What is counted of one group."""

    group: str
    windows: int
    spearman: float | None
    kendall: float | None
    both: list[int]
    curve_both: list[int]
    heat: Any

    @classmethod
    def of(cls, database: Any, group: str, shares: Sequence[float]) -> _Part:
        columns = database.execute(
            'SELECT score_a, score_b, rank_a, rank_b FROM pairs WHERE "group" = ? ORDER BY rank_a', [group]
        ).fetchnumpy()
        rank_a, rank_b = columns["rank_a"], columns["rank_b"]
        n = len(rank_a)
        # In both tops of k are those whose worse rank is at most k.
        worse = np.sort(np.maximum(rank_a, rank_b))
        both, curve = (
            [int(np.searchsorted(worse, _kept(share, n), side="right")) for share in wanted]
            for wanted in (shares, CURVE)
        )
        bins = [(rank - 1) * BINS // n for rank in (rank_a, rank_b)]
        heat = np.bincount(bins[0] * BINS + bins[1], minlength=BINS * BINS).reshape(BINS, BINS)
        return cls(group, n, *_correlations(columns["score_a"], columns["score_b"]), both, curve, heat)

    def comparison(self, shares: Sequence[float], *, curve: bool) -> GroupComparison:
        kept = [_kept(share, self.windows) for share in shares]
        return GroupComparison(
            group=self.group,
            windows=self.windows,
            spearman=self.spearman,
            kendall=self.kendall,
            overlaps=tuple(
                Overlap(share, k, both, k / self.windows)
                for share, k, both in zip(shares, kept, self.both, strict=True)
            ),
            curve=tuple(both / _kept(share, self.windows) for share, both in zip(CURVE, self.curve_both, strict=True))
            if curve
            else (),
        )


def _correlations(a: Any, b: Any) -> tuple[float | None, float | None]:
    """Spearman's and Kendall's (tau-b) rank correlation, in O(n log n)."""
    from scipy.stats import kendalltau, spearmanr

    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None, None
    return float(spearmanr(a, b).statistic), float(kendalltau(a, b, method="asymptotic").statistic)


def _kept(share: float, windows: int) -> int:
    """As many as `longsift select --keep` keeps of a group."""
    return math.ceil(ranking.exact(share) * windows)


def _together(parts: Sequence[Overlap]) -> Overlap:
    kept = sum(part.kept for part in parts)
    chance = sum(part.kept * part.chance for part in parts) / kept
    return Overlap(parts[0].share, kept, sum(part.both for part in parts), chance)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _disagreements(database: Any, groups: Sequence[str]) -> Iterator[Disagreement]:
    for group in groups:
        for higher, sign in (("a", "<"), ("b", ">")):
            rows = database.execute(
                f"""SELECT "group", '{higher}', shard, "row", window_id, n_tokens, (SELECT count(*) FROM pairs
                           WHERE "group" = $group), rank_a, rank_b, score_a, score_b
                    FROM pairs WHERE "group" = $group AND rank_a {sign} rank_b
                    ORDER BY abs(rank_a - rank_b) DESC, least(rank_a, rank_b) LIMIT {_WINDOWS}""",
                {"group": group},
            ).fetchall()
            yield from (Disagreement(*row) for row in rows)
