"""The windows stage: source files become parts of the windows table, resumable after every part.

The work is planned in pieces of files, each a shard of its own, which are cut here or elsewhere (`longsift.pieces`);
then the stage is ended with what was counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longsift.engines.pieces import cut_pieces
from longsift.errors import InputError
from longsift.options import EngineOptions, ModelOptions, WindowOptions
from longsift.pieces import parts_by_shard
from longsift.progress import Progress
from longsift.shards import RunFolder, plan_pieces
from longsift.sources import Source, find_sources
from longsift.tables import parquet_files, publish
from longsift.windows import BottomK, sample_key

_NAMED = 5  # files that could not be read and that an error names


def cut(
    inputs: Sequence[str],
    out: Path | str,
    model: ModelOptions = ModelOptions(),
    options: WindowOptions = WindowOptions(),
    *,
    overwrite: bool = False,
    quiet: bool = False,
    cluster: EngineOptions | None = None,
) -> dict[str, Any]:
    """Read documents and cut them into windows of token ids, one piece of a file after the other.

    Args:
        inputs: files, folders, globs or urls (see `longsift.documents.find_sources`).
        out: folder of the run.
        cluster: cut them on a Ray cluster, not here.

    Returns:
        Counts: documents, bad_rows, too_short, windows, tokens.

    Raises:
        InputError: nothing to read, or a source that cannot be opened.
        OutputError: the folder holds windows of another run.
    """
    sources = find_sources(inputs)
    folder = RunFolder(out)
    with folder.lock():
        return cut_sources(sources, folder, model, options, overwrite=overwrite, quiet=quiet, cluster=cluster)


def cut_sources(
    sources: Sequence[Source],
    folder: RunFolder,
    model: ModelOptions,
    options: WindowOptions,
    *,
    overwrite: bool,
    quiet: bool,
    on_part: Callable[[Path], None] = lambda path: None,
    cluster: EngineOptions | None = None,
) -> dict[str, Any]:
    """Do as `cut` in a run folder whose lock is held.

    A file that cannot be read does not stop the others: it is tried again when the run goes on, from where it failed.

    Args:
        on_part: called for every file of the windows table, those of an earlier process too, when it is there.
        cluster: cut on a Ray cluster, where that can be; what its tasks cannot read is tried here once more.
    """
    if begin_windows(sources, folder, model, options, overwrite=overwrite):
        return dict(folder.section("windows")["counts"])
    pieces = plan_pieces(sources, options.piece_bytes)
    done = folder.records("windows")
    for path in sorted(
        path for shard, paths in parts_by_shard(folder.windows).items() if shard in done for path in paths
    ):
        on_part(path)
    size, cut_before = (sum(pieces[shard].size for shard in some) for some in (pieces, done))
    with Progress("windows", size, "bytes", done=cut_before, quiet=quiet) as progress:
        if cluster is not None and can_be_cut_elsewhere(sources, options):
            from longsift.engines.ray_cluster import cut_on_cluster

            cut_on_cluster(folder, model, options, cluster, [s for s in pieces if s not in done], progress)
            done = folder.records("windows")
        left = {shard: piece for shard, piece in pieces.items() if shard not in done}
        read_before = sum(record["documents"] for record in done.values())
        unread = cut_pieces(left, folder, model, options, progress, on_part, read_before=read_before)
    if unread:
        raise InputError(
            f"{len(unread):,} of {len(sources):,} files could not be read; all others were cut. The same command tries "
            "them again. " + "; ".join(unread[:_NAMED]) + ("; …" if len(unread) > _NAMED else "")
        )
    records = folder.records("windows").values()
    counts = _sum_counts(records)
    if options.sample is not None:
        _keep_sample(folder, options.sample, options.seed)
        counts |= {"windows_before_sample": counts["windows"], **_count_sample(folder)}
    # A piece that another process cut may be the one that had text.
    text = {key: next((r[key] for r in records if r[key] is not None), None) for key in ("tokenizer", "length")}
    folder.forget_places()
    folder.finish("windows", {"counts": counts, "seconds": _seconds_by_the_clock(records), **text})
    return counts


def begin_windows(
    sources: Sequence[Source], folder: RunFolder, model: ModelOptions, options: WindowOptions, *, overwrite: bool
) -> bool:
    """Begin the windows stage of a run folder, or go on with it; returns True when it is done.

    Raises:
        OutputError: the folder holds windows of another run.
    """
    identity = {
        "inputs": [[source.url, source.size, source.version] for source in sources],
        "model": model.model or "embedded",
        "revision": model.revision,
        "text_key": options.text_key,
        "id_key": options.id_key,
        "group_by": options.group_by,
        "tab_ids": options.tab_ids,
        "window": options.window,
        "sample": options.sample,
        "seed": options.seed if options.sample else None,
        "limit": options.limit,
        "shard_tokens": options.shard_tokens,
        "piece_bytes": options.piece_bytes,
    }
    return folder.begin("windows", identity, overwrite=overwrite)


def can_be_cut_elsewhere(sources: Sequence[Source], options: WindowOptions) -> bool:
    """Whether other machines can cut the pieces of these files.

    Not where a limit has one piece wait for those before it; nor where an address has a secret, which would have to be
    written down for them.
    """
    return options.limit is None and all(source.address == source.url for source in sources)


def _keep_sample(folder: RunFolder, size: int, seed: int) -> None:
    """Drop the windows that are not in the sample; whoever cut them kept those that might be."""
    sample = BottomK(size)
    files = parquet_files(folder.windows)
    for path in files:
        for window_id in pq.read_table(path, columns=["window_id"])["window_id"].to_pylist():
            sample.offer(sample_key(window_id, seed))
    threshold = sample.threshold or 0
    for path in files:
        table = pq.read_table(path)
        kept = [sample_key(window_id, seed) <= threshold for window_id in table["window_id"].to_pylist()]
        if not any(kept):
            path.unlink()
        else:  # also where all are kept: read and written once more, they are other bytes
            with publish(path) as temporary:
                pq.write_table(table.filter(pa.array(kept)), temporary, compression="zstd")


def _seconds_by_the_clock(records: Iterable[dict[str, Any]]) -> float:
    """For how long some piece was being cut; several may have been at once, and none for a time."""
    total, reached = 0.0, 0.0
    for began, ended in sorted((record["ended"] - record["seconds"], record["ended"]) for record in records):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return round(total, 3)


def _sum_counts(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    records = list(records)
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record["reasons"])
    names = ("documents", "bad_rows", "too_short", "too_short_tokens", "windows", "tokens")
    return {name: sum(record[name] for record in records) for name in names} | {"reasons": dict(reasons.most_common())}


def _count_sample(folder: RunFolder) -> dict[str, int]:
    lengths = [pq.read_table(path, columns=["n_tokens"])["n_tokens"] for path in parquet_files(folder.windows)]
    return {"windows": sum(map(len, lengths)), "tokens": sum(sum(length.to_pylist()) for length in lengths)}
