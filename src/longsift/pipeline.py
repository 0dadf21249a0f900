"""The stages of a run as functions: cut → score → select → report, each resumable, and `run`, which does all.

Every function takes the run folder, does its stage under the folder's lock, and returns what it did as a dict of
plain values, which the command line prints.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from longsift.cutting import cut as cut
from longsift.cutting import cut_sources
from longsift.errors import OutputError, TooManyBadRows, UsageError
from longsift.options import EngineOptions, ModelOptions, ScoreOptions, SelectOptions, WindowOptions
from longsift.scoring_stage import ScoreStage, model_of, windows_to_score
from longsift.shards import RunFolder
from longsift.sources import find_sources
from longsift.tables import parquet_files

if TYPE_CHECKING:
    from longsift.selection import Choice

log = logging.getLogger(__name__)

DEFAULT_KEEP = 0.125


def folder_to_score(
    inputs: Sequence[str], out: Path | str | None, options: WindowOptions = WindowOptions(), *, overwrite: bool = False
) -> tuple[Path, Sequence[str] | None]:
    """The run folder to score: the one given, a new one on the windows of the one given, or one for documents.

    Returns:
        The folder, and the documents that are still to be cut for it; None where its windows are there.

    Raises:
        UsageError: documents without a folder for the run; options that would cut other windows than the folder's.
        OutputError: `out` holds windows of its own.
    """
    given = run_folder(inputs)
    check_uncut(given, options)
    if given is None:
        if out is None:
            raise UsageError("Scoring documents needs a folder for the run: -o OUT.")
        return Path(out), inputs
    if out is None or Path(out).resolve() == given.resolve():
        return given, None
    source, folder = RunFolder(given), RunFolder(out)
    section = source.section("windows")
    with folder.lock():
        own = folder.manifest().get("windows")
        shared = section | {"folder": os.path.relpath(source.windows, folder.path)}
        if own != shared:
            if own and not overwrite:
                raise OutputError(f"{out} holds other windows. Choose another output folder, or use --overwrite.")
            folder.clear("windows")
            folder.clear("scores")
            folder.replace("windows", shared)
    return Path(out), None


def run_folder(inputs: Sequence[str]) -> Path | None:
    """The run folder that the inputs name, or None when they are documents."""
    given = Path(inputs[0])
    return given if len(inputs) == 1 and (given / "manifest.json").is_file() else None


def check_uncut(folder: Path | None, options: WindowOptions) -> None:
    """Refuse options that would cut other windows than those that a run folder has.

    Args:
        folder: whose windows are to be scored; None for documents, which are still to be cut.

    Raises:
        UsageError: an option is given and differs from what the windows were cut with.
        OutputError: the folder has no finished windows.
    """
    if folder is None:
        return
    windows = RunFolder(folder).section("windows")
    plain, cut = WindowOptions(), windows["identity"]
    for field in fields(options):
        name, value = field.name, getattr(options, field.name)
        known = (getattr(plain, name), cut.get(name), windows["length"] if name == "window" else None)
        if name in cut and value not in known:
            raise UsageError(
                f"--{name.replace('_', '-')} {value} would cut other windows than those of {folder}, which are cut "
                "already. Leave it out, or score the documents into another folder."
            )


def calculator_for(inputs: Sequence[str], model: ModelOptions) -> ModelOptions:
    """The calculator that was asked for, or else the one that a run folder's windows were cut for.

    Raises:
        OutputError: the folder has no finished windows.
    """
    given = run_folder(inputs)
    return model if given is None else model_of(RunFolder(given).section("windows"), model)


def score(
    out: Path | str,
    model: ModelOptions = ModelOptions(),
    options: ScoreOptions = ScoreOptions(),
    *,
    overwrite: bool = False,
    quiet: bool = False,
    cluster: EngineOptions | None = None,
) -> dict[str, Any]:
    """Measure the windows of a run folder, shard by shard; shards that an earlier run finished stay.

    Args:
        cluster: measure them on a Ray cluster, not here.

    Returns:
        Counts (windows, failed, tokens), seconds, tokens_per_second, and failures by reason.

    Raises:
        OutputError: no windows, or scores of other parameters.
        InputError: not one window was cut.
        ModelError: a calculator that cannot be loaded, or that does not share the windows' tokenizer.
    """
    folder = RunFolder(out)
    windows_to_score(folder)  # before a folder is made
    with (
        folder.lock(),
        ScoreStage(folder, model, options, overwrite=overwrite, quiet=quiet, cluster=cluster) as stage,
    ):
        return stage.finish()


def select(
    out: Path | str,
    options: SelectOptions = SelectOptions(),
    *,
    alpha: float | None = None,
    normalize: str | None = None,
    layer_aggregation: str | None = None,
    without_set_aside: bool = False,
) -> dict[str, Any]:
    """Keep the best windows of every group and write them as a data set; nothing is scored again.

    Args:
        alpha, normalize: of longattn, in place of those that the run was scored with.
        layer_aggregation: of ladm, likewise.
        without_set_aside: select from the windows that are scored, though shards of others were set aside.

    Returns:
        Totals and a row for each group.

    Raises:
        OutputError: the folder has no finished scores.
        ShardsSetAside: shards of windows could not be scored, and `without_set_aside` is not given.
        UsageError: options that cannot work.
    """
    from longsift.datasets import write_dataset

    folder = RunFolder(out)
    changed = {"alpha": alpha, "normalize": normalize, "layer_aggregation": layer_aggregation}
    scores = folder.section("scores", incomplete=without_set_aside)
    identity = _selection_identity(options, changed, scores["identity"])
    missing = scores.get("set_aside", {"shards": 0, "windows": 0})
    if missing["shards"]:
        log.warning("%d windows of %d shards that are set aside are left out", missing["windows"], missing["shards"])
    if options.text or options.input_ids:
        folder.check_linked_windows()
    with folder.lock():
        with _choose(folder, identity) as choice:
            write_dataset(
                choice,
                folder.windows,
                folder.path,
                format=options.format,
                text=options.text,
                input_ids=options.input_ids,
                card=_card(folder.manifest(), identity),
            )
            if not choice.kept:
                log.warning(
                    "nothing is kept: %s",
                    "the budget is smaller than any window" if choice.windows else "no window was scored",
                )
            result = {
                "kept": choice.kept,
                "of": choice.windows,
                "kept_tokens": choice.kept_tokens,
                "failed": choice.failed,
                "set_aside": missing["windows"],
                "passed_over": choice.passed_over,
                "overlapping": choice.overlapping,
                "duplicates": choice.duplicates,
                "groups": _group_rows(choice),
                "quotas": [
                    {
                        "groups": "+".join(quota.groups),
                        "share": quota.share,
                        "tokens": quota.tokens,
                        "kept_tokens": quota.kept,
                        "shortfall": quota.shortfall,
                    }
                    for quota in choice.quotas
                ],
            }
            for quota in choice.quotas:
                if quota.shortfall:
                    log.warning(
                        "%s: %d tokens short of the %d asked for",
                        "+".join(quota.groups),
                        quota.shortfall,
                        quota.tokens,
                    )
        folder.replace("selected", {"identity": identity, "result": result})
    if folder.report.exists():  # it would show another selection
        if folder.windows.is_dir():
            report(out)
        else:
            folder.report.unlink()
            log.warning("report.html is removed: it showed another selection, and the windows for a new one are gone")
    return result


def _selection_identity(options: SelectOptions, changed: dict[str, Any], scored: dict[str, Any]) -> dict[str, Any]:
    """What a selection depends on, as JSON values, from that of its scores; `changed` parameters that are not None."""
    keep = options.keep if options.keep is not None or options.budget is not None else DEFAULT_KEEP
    return {
        "method": scored["method"],
        "parameters": scored["parameters"] | {key: value for key, value in changed.items() if value is not None},
        "keep": keep,
        "budget": options.budget,
        "mix": parse_mix(options.mix),
        "overlap": options.overlap,
        "dedup": options.dedup,
    }


def _choose(folder: RunFolder, identity: dict[str, Any]) -> Choice:
    from longsift.methods import build_method
    from longsift.selection import choose

    method = build_method(identity["method"], **identity["parameters"])
    return choose(
        folder.scores,
        method.rule(),
        keep=identity["keep"],
        budget=identity["budget"],
        mix=identity["mix"],
        overlap=identity.get("overlap", True),  # as before there was a choice
        dedup=identity.get("dedup"),
        windows=folder.windows,
    )


def ranking_of(folder: RunFolder) -> Choice:
    """The choice of a run's selection; of a run that is only scored, one that keeps every window. Close it.

    Raises:
        OutputError: the folder has no finished scores.
    """
    scores = folder.section("scores", incomplete=True)
    selected = folder.manifest().get("selected", {"status": None})
    if selected["status"] == "done":
        return _choose(folder, selected["identity"])
    return _choose(folder, scores["identity"] | {"keep": 1.0, "budget": None, "mix": None})


def parse_mix(text: str | None) -> dict[str, float] | None:
    """Shares such as "arxiv=0.3,book=0.3" by group; None stays None.

    Raises:
        UsageError: not a list of group=share.
    """
    if text is None:
        return None
    try:
        pairs = [part.rsplit("=", 1) for part in text.split(",")]
        shares = {group.strip(): float(share) for group, share in pairs}
        if len(shares) < len(pairs):
            raise UsageError(f"--mix names a group twice: '{text}'.")
        return shares
    except ValueError as error:
        raise UsageError(f"--mix takes shares by group such as arxiv=0.3,book=0.3, not '{text}'.") from error


def _card(manifest: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """The facts that a data set's card states."""
    from longsift.methods import build_method

    windows, scores = manifest["windows"], manifest["scores"]
    calculator = scores["calculator"]
    return {
        "method": identity["method"],
        "parameters": identity["parameters"],
        "model": calculator["model"],
        "revision": calculator["revision"],
        "dtype": calculator["dtype"],
        "window": windows["length"] or "as given",
        "group_by": windows["identity"]["group_by"] or "source, where present",
        "keep": identity["keep"],
        "budget": identity["budget"],
        "mix": identity["mix"],
        "overlap": identity["overlap"],
        "dedup": identity["dedup"],
        "set_aside": scores.get("set_aside"),
        "citation": build_method(identity["method"], **identity["parameters"]).citation,
    }


def _group_rows(choice: Choice) -> list[dict[str, Any]]:
    return [
        {
            "group": group.group,
            "windows": group.windows,
            "tokens": group.tokens,
            "kept": group.kept,
            "share": group.kept / group.windows if group.windows else None,
            "kept_tokens": group.kept_tokens,
            "mix": group.kept_tokens / choice.kept_tokens if choice.kept_tokens else None,
            "best": group.best,
            "cut": group.cut,
            "worst": group.worst,
            **({"passed_over": group.passed_over} if choice.passed_over else {}),
            **({"overlapping": group.overlapping} if choice.overlapping else {}),
            **({"duplicates": group.duplicates} if choice.duplicates else {}),
        }
        for group in choice.groups
    ]


def report(out: Path | str, *, map_seconds: float = 0.0, against: Path | str | None = None) -> Path:
    """Write OUT/report.html for a run that has been selected, and return its path.

    Args:
        map_seconds: for how long to measure dependency maps of the windows that the page shows; those of earlier
            reports are kept.
        against: folder of another run over the same windows, to compare with.

    Raises:
        OutputError: the folder has no finished selection; nothing in `against` to compare with.
        UsageError: `map_seconds` is below 0.
    """
    from longsift.report import write_report

    if map_seconds < 0:
        raise UsageError(f"--map-seconds is a time of 0 or more, not {map_seconds:g}.")

    folder = RunFolder(out)
    identity = folder.section("selected")["identity"]
    folder.check_linked_windows()
    with _choose(folder, identity) as choice:
        return write_report(
            folder.path,
            folder.manifest(),
            choice,
            folder.windows,
            map_seconds=map_seconds,
            against=None if against is None else Path(against),
        )


def run(
    inputs: Sequence[str],
    out: Path | str,
    model: ModelOptions = ModelOptions(),
    windows: WindowOptions = WindowOptions(),
    scores: ScoreOptions = ScoreOptions(),
    selection: SelectOptions = SelectOptions(),
    *,
    overwrite: bool = False,
    quiet: bool = False,
    cluster: EngineOptions | None = None,
) -> dict[str, Any]:
    """Do all stages; a run that was stopped goes on where it was.

    Args:
        cluster: cut and score on a Ray cluster, not here.

    Returns:
        The results of the stages, by name, and the report's path.
    """
    check_flags(model, windows, scores, selection)
    sources = find_sources(inputs)
    folder = RunFolder(out)
    with folder.lock(), ScoreStage(folder, model, scores, overwrite=False, quiet=quiet, cluster=cluster) as stage:
        cut_counts = cut_sources(
            sources,
            folder,
            model,
            windows,
            overwrite=overwrite,
            quiet=quiet,
            # Which windows a sample has is known at the end only.
            on_part=stage.offer if windows.sample is None and stage.apart else lambda path: None,
            cluster=cluster,
        )
        check_mix(out, selection)
        counts = stage.finish()
    result = {"windows": cut_counts, "scores": counts, "selected": select(out, selection)}
    return result | {"report": str(report(out))}


def check_flags(
    model: ModelOptions, windows: WindowOptions, scores: ScoreOptions, selection: SelectOptions | None = None
) -> None:
    """Check options together: a run of hours must not end in a refusal that a look at its flags could have given.

    Raises:
        UsageError: they cannot work.
    """
    from longsift.scoring import check_layers, score_identity
    from longsift.selection import check_request

    identity = score_identity(model.model or "embedded", model.revision, scores, windows.window)
    check_layers(model, scores)
    if selection is not None:
        asked = _selection_identity(selection, {}, identity)
        check_request(asked["keep"], asked["budget"], asked["mix"])


def check_mix(out: Path | str, selection: SelectOptions) -> None:
    """Refuse a mix of groups of which no window was cut, before any is scored.

    Raises:
        UsageError: `mix` names such groups.
    """
    if (mix := parse_mix(selection.mix)) is not None:
        from longsift.ranking import check_groups

        files = parquet_files(RunFolder(out).windows)
        groups: set[str] = set()
        for path in files:
            groups.update(pq.read_table(path, columns=["group"])["group"].unique().to_pylist())
        check_groups(mix, sorted(groups))


def check_bad(out: Path | str, max_bad: float) -> None:
    """Complain of a finished run in which too much went wrong.

    Raises:
        TooManyBadRows: the share of bad rows, or of windows that could not be scored, is above `max_bad`.
    """
    manifest = RunFolder(out).manifest()
    counts = manifest["windows"]["counts"]
    rows = counts["documents"] + counts["bad_rows"]
    if counts["bad_rows"] > max_bad * rows:
        raise TooManyBadRows(
            f"{counts['bad_rows']:,} of {rows:,} rows are bad, more than --max-bad {max_bad:g}; all others were done. "
            f"See {RunFolder(out).quarantine}."
        )
    scored = manifest.get("scores", {}).get("counts")
    if scored and scored["failed"] > max_bad * scored["windows"]:
        reasons = manifest["scores"]["reasons"]
        raise TooManyBadRows(
            f"{scored['failed']:,} of {scored['windows']:,} windows could not be scored, more than --max-bad "
            f"{max_bad:g}; all others were. Most often: {next(iter(reasons))}."
        )
