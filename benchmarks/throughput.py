"""How many tokens a second become scores: from token ids, from text, on one GPU and on several?

    python benchmarks/throughput.py                                every part, shapes with random weights
    python benchmarks/throughput.py --part ids --case longattn-8b  ids → scores, through `Scorer.measure_batch`
    python benchmarks/throughput.py --part text --corpus FOLDER    text → scores, as `longsift run` does it
    python benchmarks/throughput.py --part workers --workers 1 2   the same windows on one GPU and on two

ids: windows of ids that are drawn evenly from the vocabulary, on the host, to rows of measures on the host.
sampled: how well LongAttn's scores from one query of eight order real windows, against those from all of them.
text: documents (JSON lines) to tables of scores, as `longsift run` does it up to its selection; reading and tokenising
also alone. The rate of the second half is that of a long run, which has no start. Where no corpus is given it is the
sources of the standard library and of the installed packages, and where no tokenizer is given, the embedded
calculator's: 8,192 entries, so a text has more tokens than under a large model's.
workers: tokens a second between the first and the last shard of scores, so without start and compilation.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from longsift import pipeline
from longsift.calculators.checkpoint import EMBEDDED
from longsift.cutting import cut_sources
from longsift.documents import Document, ReadOptions, read_documents
from longsift.options import ModelOptions, ScoreOptions, WindowOptions
from longsift.pieces import load_tokenizer
from longsift.scoring import Scorer, resolve_device
from longsift.scoring_stage import ScoreStage
from longsift.shards import RunFolder
from longsift.sources import find_sources
from longsift.tables import parquet_files
from measuring import parser, table, write
from shapes import random_checkpoint, random_windows, write_corpus

LENGTH, QUICK = 32_768, 2_560
CHARACTERS, QUICK_CHARACTERS, FILES = 160_000_000, 400_000, 64  # of the corpus
SECONDS, ROUNDS = 1.0, 3  # of one measurement
SAMPLED_WINDOWS = 256
TOKENIZED_TOGETHER = 4 << 20  # characters

Windows = Sequence[npt.NDArray[np.int32]]


@dataclass(frozen=True)
class Case:
    """A method with its calculator."""

    title: str
    method: str
    model: str  # a key of shapes.MODELS, or "embedded"
    parameters: dict[str, Any] = field(default_factory=dict)


CASES = {
    "longattn-8b": Case("LongAttn, Llama-3.1-8B", "longattn", "llama-3.1-8b"),
    "longattn-8b-sampled": Case(
        "LongAttn, 8B, 1/8 of the queries", "longattn", "llama-3.1-8b", {"query_fraction": 1 / 8}
    ),
    "longattn-70b": Case("LongAttn, Llama-3.1-70B", "longattn", "llama-3.1-70b"),
    "ladm": Case("LADM, TinyLlama-1.1B, published strides", "ladm", "tinyllama-1.1b"),
    "ladm-dense": Case("LADM, TinyLlama-1.1B, dense", "ladm", "tinyllama-1.1b", {"dense": True}),
    "calibrated-embedded": Case("calibrated, embedded calculator", "calibrated", "embedded"),
}
FROM_TEXT = ("longattn-8b", "calibrated-embedded")


class Models:
    """Checkpoints of the shapes, each written once, when it is first wanted."""

    def __init__(self, folder: Path, device: torch.device, quick: bool, tokenizer: Path) -> None:
        self.folder, self.device, self.quick, self.tokenizer = folder, device, quick, tokenizer

    def of(self, case: Case) -> str:
        if case.model == "embedded":
            return "embedded"
        first_layer = case.method == "longattn"
        folder = self.folder / f"{case.model}-{'first-layer' if first_layer else 'whole'}"
        if not folder.exists():
            random_checkpoint(
                folder, case.model, self.device, first_layer=first_layer, quick=self.quick, tokenizer=self.tokenizer
            )
        return str(folder)


def ids_row(name: str, models: Models, length: int, device: torch.device) -> dict[str, Any]:
    """Time `Scorer.measure_batch` of one case, ids on the host to measures on the host."""
    case = CASES[name]
    scorer = Scorer(case.method, model=models.of(case), device=str(device), **case.parameters)
    together = max(4, 2 * scorer.batch_tokens // length)
    windows = random_windows(together, length, scorer.calculator.vocab_size)
    _checked(scorer, windows[:4])  # compiles, and captures from the third window on
    once = _seconds(lambda: _checked(scorer, windows[:4])) / 4
    if once * together < SECONDS:
        once = _seconds(lambda: _checked(scorer, windows)) / together  # the shapes of whole batches
    number = 4 if models.quick else max(4, round(SECONDS / once))
    if number > together:
        number -= number % together  # whole batches
    some = [windows[i % together] for i in range(number)]
    times = [_seconds(lambda: _checked(scorer, some)) / number for _ in range(ROUNDS)]
    one = [_seconds(lambda: _checked(scorer, windows[:1])) for _ in range(ROUNDS)]
    return {
        "case": case.title,
        "name": name,
        "length": length,
        "ms": statistics.median(times) * 1e3,
        "low_ms": min(times) * 1e3,
        "high_ms": max(times) * 1e3,
        "windows": number,
        "one_window_ms": statistics.median(one) * 1e3,
        "tokens_per_s": length / statistics.median(times),
    }


def _checked(scorer: Scorer, windows: Windows) -> list[dict[str, Any]]:
    results = scorer.measure_batch(windows)
    failed = [result for result in results if isinstance(result, Exception)]
    if failed:
        raise failed[0]
    return results


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def sampled_rows(models: Sequence[str], windows: Windows, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rank correlation of sampled and exact LongAttn measures over real windows, with weights that were trained."""
    from scipy.stats import spearmanr, zscore

    for model in models:
        measures: dict[float, dict[str, npt.NDArray[np.float64]]] = {}
        for fraction in (1.0, 1 / 8):
            scorer = Scorer("longattn", model=model, device=str(device), query_fraction=fraction)
            results = _checked(scorer, windows)
            found = {key: np.array([row[key] for row in results]) for key in ("dependency_strength", "variance")}
            measures[fraction] = found | {
                "score": zscore(found["dependency_strength"]) - 0.5 * zscore(found["variance"])
            }
        yield {
            "model": Path(model).name,
            "windows": len(windows),
            "length": len(windows[0]),
            "spearman": {key: float(spearmanr(measures[1.0][key], measures[1 / 8][key])[0]) for key in measures[1.0]},
        }


def stages_alone(corpus: Path, model: str) -> dict[str, float]:
    """Seconds of reading the documents and of tokenising them, each without anything beside it."""
    texts: list[str] = []

    def read() -> None:
        rows = (row for source in find_sources([str(corpus)]) for row in read_documents(source, ReadOptions()))
        texts.extend(row.text for row in rows if isinstance(row, Document))

    def tokenize() -> None:
        tokenizer = load_tokenizer(model, None, False)
        held: list[str] = []
        for text in texts:
            held.append(text)
            if sum(map(len, held)) >= TOKENIZED_TOGETHER:
                tokenizer.encode(held)
                held = []
        tokenizer.encode(held)

    return {"reading alone": _seconds(read), "tokenising alone": _seconds(tokenize)}


def text_row(
    name: str, models: Models, corpus: Path, folder: Path, length: int, device: torch.device
) -> dict[str, Any]:
    """Time text → scores of one case: `longsift run` up to its selection."""
    case = CASES[name]
    model = ModelOptions(model=models.of(case))
    sources = find_sources([str(corpus)])
    run = RunFolder(folder / f"text-{name}")
    windows = WindowOptions(window=length)
    options = ScoreOptions(method=case.method, device=str(device), **case.parameters)
    began, began_ns = time.perf_counter(), time.time_ns()
    with run.lock(), ScoreStage(run, model, options, overwrite=False, quiet=True) as stage:
        on_part = stage.offer if stage.apart else lambda _: None
        cut_sources(sources, run, model, windows, overwrite=False, quiet=True, on_part=on_part)
        cut = time.perf_counter() - began
        counts = stage.finish()
        seconds = time.perf_counter() - began
    return {
        "case": case.title,
        "name": name,
        "length": length,
        "bytes": sum(source.size for source in sources),
        **{key: counts[key] for key in ("windows", "failed", "tokens")},
        "stages_s": {"until all is cut": cut},
        "seconds": seconds,
        "tokens_per_s": counts["tokens"] / seconds,
        "running_tokens_per_s": running_rate(run, began_ns),
    }


def running_rate(run: RunFolder, began_ns: int) -> float:
    """Tokens a second in the second half of a run: what a longer run would have, without its start."""
    shards = {path: path.stat().st_mtime_ns for path in parquet_files(run.scores)}
    half = (began_ns + max(shards.values())) // 2
    return sum(_tokens(path) for path, at in shards.items() if at > half) / ((max(shards.values()) - half) * 1e-9)


def _tokens(scores: Path) -> int:
    return sum(pq.read_table(scores, columns=["n_tokens"])["n_tokens"].to_pylist())


def steady_rate(run: Path, workers: int) -> float | None:
    """Tokens a second from the first shard of scores of every worker to the last; None for too few shards."""
    shards = sorted(parquet_files(RunFolder(run).scores), key=lambda path: path.stat().st_mtime_ns)
    if len(shards) <= 2 * workers:
        return None
    began, ended = (shards[i].stat().st_mtime_ns for i in (workers - 1, -1))
    return sum(map(_tokens, shards[workers:])) / ((ended - began) * 1e-9)


def worker_rows(
    models: Models, run: Path, folder: Path, workers: Sequence[int], device: str
) -> Iterator[dict[str, Any]]:
    """Score the same windows with other numbers of processes, one for each GPU."""
    case = CASES["longattn-8b"]
    for number in workers:
        out = folder / f"workers-{number}"
        model = ModelOptions(model=models.of(case))
        pipeline.folder_to_score([str(run)], out)
        options = ScoreOptions(method=case.method, device=device, workers=number)
        seconds = _seconds(lambda: pipeline.score(out, model, options, quiet=True))  # noqa: B023 called here
        tokens = RunFolder(out).section("scores")["counts"]["tokens"]
        yield {
            "case": case.title,
            "workers": number,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": steady_rate(out, number),
        }


def id_run(folder: Path, windows: Windows) -> Path:
    """A run folder whose windows are the given ids."""
    (folder / "ids").mkdir()
    for start in range(0, len(windows), 256):
        some = windows[start : start + 256]
        offsets = np.cumsum([0, *map(len, some)], dtype=np.int32)
        column = pa.ListArray.from_arrays(offsets, np.concatenate(some))
        pq.write_table(pa.table({"input_ids": column}), folder / "ids" / f"{start:06d}.parquet")
    pipeline.cut([str(folder / "ids")], folder / "ids-run", quiet=True)
    return folder / "ids-run"


def read_windows(run: Path, most: int) -> Windows:
    """The first windows of a run."""
    found: list[npt.NDArray[np.int32]] = []
    for path in parquet_files(RunFolder(run).windows):
        column = pq.read_table(path, columns=["input_ids"])["input_ids"]
        found += [column[i].values.to_numpy() for i in range(len(column))]
        if len(found) >= most:
            break
    return found[:most]


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=given) as name:
        yield Path(name)


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parser(__doc__)
    parts = ("ids", "sampled", "text", "workers")
    flags.add_argument("--part", choices=parts, action="append", help="only this one; may be repeated")
    flags.add_argument("--case", choices=[*CASES], action="append", help="of ids and text: only this one")
    flags.add_argument("--length", type=int, default=None, help="tokens of a window")
    flags.add_argument("--corpus", type=Path, help="folder or file of documents")
    flags.add_argument(
        "--characters", type=int, default=None, help="size of the corpus that is made where none is given"
    )
    flags.add_argument("--tokenizer", type=Path, default=EMBEDDED, help="folder of a tokenizer")
    flags.add_argument(
        "--trained", action="append", help="of sampled: a model with the corpus's tokenizer; or embedded"
    )
    flags.add_argument("--workers", type=int, nargs="+", default=None, help="numbers of processes; 1 to all GPUs")
    flags.add_argument("--tmp", type=Path, help="folder for checkpoints and runs")
    args = flags.parse_args(arguments)
    device = resolve_device(args.device)
    length = args.length or (QUICK if args.quick else LENGTH)
    chosen = args.part or parts
    cases = args.case or list(CASES)
    results: dict[str, Any] = {}
    with _folder(args.tmp) as folder:
        models = Models(folder, device, args.quick, args.tokenizer)
        if "ids" in chosen:
            results["ids"] = []
            for name in cases:
                results["ids"].append(ids_row(name, models, length, device))
                _release(device)
            print("\n" + ids_table(results["ids"]), flush=True)
        corpus = args.corpus
        if corpus is None and {"sampled", "text"} & {*chosen}:
            corpus = folder / "corpus"
            write_corpus(corpus, args.characters or (QUICK_CHARACTERS if args.quick else CHARACTERS), FILES)
        run: Path | None = None
        if "text" in chosen:
            names = args.case or list(FROM_TEXT)
            alone = stages_alone(corpus, models.of(CASES[names[0]]))
            results["text"] = []
            for name in names:
                row = text_row(name, models, corpus, folder, length, device)
                results["text"].append(row | {"stages_s": alone | row["stages_s"]})
                _release(device)
            print("\n" + text_table(results["text"]), flush=True)
            run = folder / f"text-{names[0]}"
        if "sampled" in chosen:
            if run is None:
                run = folder / "sampled"
                model = ModelOptions(model=str(args.tokenizer))
                pipeline.cut([str(corpus)], run, model, WindowOptions(window=length), quiet=True)
            most = 8 if args.quick else SAMPLED_WINDOWS
            results["sampled"] = list(sampled_rows(args.trained or ["embedded"], read_windows(run, most), device))
            print("\n" + sampled_table(results["sampled"]), flush=True)
        numbers = args.workers or list(range(1, torch.cuda.device_count() + 1))
        if "workers" in chosen and (args.workers or len(numbers) > 1):
            _release(device)
            vocabulary = 8192 if args.quick else 128_256
            windows = random_windows(4 if args.quick else 1024 * max(numbers), length, vocabulary)
            results["workers"] = list(worker_rows(models, id_run(folder, windows), folder, numbers, args.device))
            print("\n" + worker_table(results["workers"]), flush=True)
    write(args.out, device, results)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ids_table(rows: Sequence[dict[str, Any]]) -> str:
    """Ids → scores of each case."""
    headers = ("ids → scores", "tokens", "ms a window", "least–largest", "one window alone ms", "tokens/s")
    return table(headers, [_ids_cells(row) for row in rows])


def _ids_cells(row: dict[str, Any]) -> tuple[object, ...]:
    spread = f"{row['low_ms']:.3g}–{row['high_ms']:.3g}"
    return row["case"], row["length"], row["ms"], spread, row["one_window_ms"], round(row["tokens_per_s"])


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Text → scores of each case, and the seconds of the stages."""
    names = list(dict.fromkeys(name for row in rows for name in row["stages_s"]))
    headers = (
        "text → scores",
        "MB",
        "windows",
        "tokens",
        *(f"{name} s" for name in names),
        "all s",
        "tokens/s",
        "second half",
    )
    cells = [
        (
            row["case"],
            row["bytes"] / 1e6,
            row["windows"],
            row["tokens"],
            *map(row["stages_s"].get, names),
            row["seconds"],
            round(row["tokens_per_s"]),
            round(row["running_tokens_per_s"]),
        )
        for row in rows
    ]
    return table(headers, cells)


def sampled_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rank correlations of sampled with exact measures."""
    names = list(rows[0]["spearman"])
    cells = [(row["model"], row["windows"], row["length"], *map(row["spearman"].get, names)) for row in rows]
    headers = ("1/8 of the queries against all, Spearman", "windows", "tokens", *names)
    return table(headers, cells)


def worker_table(rows: Sequence[dict[str, Any]]) -> str:
    """Tokens a second by the number of processes."""
    first = rows[0]["tokens_per_s"]
    cells = [
        (
            row["workers"],
            row["tokens"],
            row["seconds"],
            row["tokens_per_s"],
            row["tokens_per_s"] / first if first and row["tokens_per_s"] else None,
        )
        for row in rows
    ]
    return table(("workers", "tokens", "s, with start", "tokens/s, running", "× one"), cells)


if __name__ == "__main__":
    main()
