"""The command line: parse, call one public function, print.

Data goes to files or stdout, logs and progress to stderr. Exit codes: 0 done, 1 failed or too many bad rows,
2 usage, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import logging
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from longsift import __version__
from longsift.errors import LongsiftError, UsageError
from longsift.options import (
    CalibrateOptions,
    ControlOptions,
    EngineOptions,
    InspectOptions,
    MeterOptions,
    ModelOptions,
    NeedleOptions,
    ScoreOptions,
    SelectOptions,
    WindowOptions,
)
from longsift.training.options import TrainOptions

app = typer.Typer(
    name="longsift",
    help="Select long-context training data by what a language model's own attention depends on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the defaults of all flags from a YAML file; flags on the command line win."""
    if path is None:
        return None
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} must hold 'flag: value' lines")
    values: dict[str, Any] = {}
    flags = {flag.lstrip("-"): (p.name, True) for p in context.command.params for flag in p.opts}
    flags |= {flag.lstrip("-"): (p.name, False) for p in context.command.params for flag in p.secondary_opts}
    for key, value in content.items():
        flag = str(key).lstrip("-").replace("_", "-")
        if flag not in flags:
            raise typer.BadParameter(f"{path} names a flag that '{context.info_name}' does not have: {key}")
        name, on = flags[flag]
        if isinstance(value, dict):  # mix: {arxiv: 0.3, book: 0.3}
            value = ",".join(f"{group}={share}" for group, share in value.items())
        values[str(name)] = value if on else not value
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _set_verbosity(context: typer.Context, verbose: int) -> int:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for noisy in (
        "fsspec",
        "urllib3",
        "httpx",
        "httpcore",
        "huggingface_hub",
        "asyncio",
        "botocore",
        "filelock",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return verbose


Inputs = Annotated[
    list[str],
    typer.Argument(help="Documents: files, folders, globs, s3://… or hf://datasets/org/name.", show_default=False),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Throw old tables away instead of going on.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and how long it would take.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
Verbose = Annotated[
    int, typer.Option("-v", "--verbose", count=True, is_eager=True, callback=_set_verbosity, help="More log.")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=_read_config, help="YAML file of flags; flags given here win."),
]


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Have SIGTERM, by which Slurm and others end a run, raise: files and processes are let go before the end."""

    def unwind(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another one ends it at once
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _import_scoring() -> None:
    """Import what measures, a fifth faster without the garbage collector: thousands of modules leave it nothing.

    Nor do they later, at the process's end above all.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        import longsift.scoring  # noqa: F401
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a command that turns longsift's own errors into one line and an exit code.

    A parameter that is an options dataclass becomes one flag for each of its fields.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, type] = {}
    for parameter in signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            groups[parameter.name] = hint
            parameters.extend(_flags(hint))
        else:
            parameters.append(parameter.replace(annotation=hint))

    @functools.wraps(function)
    def call(**values: Any) -> None:
        try:
            for name, group in groups.items():
                values[name] = group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
            with _sigterm_unwinds():
                function(**values)
        except OSError as error:  # a full disk, a folder that cannot be written
            print(f"error: {error}. Once that is mended, the same command goes on where it stopped.", file=sys.stderr)
            raise typer.Exit(1) from None
        except LongsiftError as error:
            print(f"{'usage' if isinstance(error, UsageError) else 'error'}: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted: run the same command again to go on where it stopped.", file=sys.stderr)
            raise typer.Exit(130) from None
        except _Terminated:
            print("ended by SIGTERM: run the same command again to go on where it stopped.", file=sys.stderr)
            raise typer.Exit(143) from None

    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    del call.__wrapped__
    return app.command()(call)


def _flags(group: type) -> list[Parameter]:
    hints = typing.get_type_hints(group)
    flags = []
    for field in dataclasses.fields(group):
        flag = field.metadata["flag"]
        option = typer.Option(
            *([flag] if flag else []), help=field.metadata["help"], show_default=field.default is not None
        )
        flags.append(
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[hints[field.name], option],
            )
        )
    return flags


@_command
def run(
    *,
    inputs: Inputs,
    out: Out,
    model: ModelOptions,
    windows: WindowOptions,
    scores: ScoreOptions,
    selection: SelectOptions,
    engine: EngineOptions,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Read documents, score their windows, select the best and write the report."""
    from longsift import pipeline

    _import_scoring()
    if dry_run:
        from longsift.planning import estimate

        pipeline.check_flags(model, windows, scores, selection)
        _print(estimate(inputs, model, windows, scores), as_json)
        return
    if engine.engine == "slurm":
        from longsift.engines import slurm

        slurm.check(out, scores, engine)
        pipeline.check_flags(model, windows, scores, selection)
        parts = model, scores, engine, selection
        _print(slurm.submit(out, *parts, windows=windows, inputs=inputs, overwrite=overwrite, quiet=quiet), as_json)
        return
    cluster = _ray_cluster(scores, engine)
    result = pipeline.run(
        inputs, out, model, windows, scores, selection, overwrite=overwrite, quiet=quiet, cluster=cluster
    )
    _print(result, as_json)
    pipeline.check_bad(out, windows.max_bad)


@_command
def windows(
    *,
    inputs: Inputs,
    out: Out,
    model: ModelOptions,
    windows: WindowOptions,
    overwrite: Overwrite = False,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Read documents and cut them into windows of token ids."""
    from longsift import pipeline

    _print(pipeline.cut(inputs, out, model, windows, overwrite=overwrite, quiet=quiet), as_json)
    pipeline.check_bad(out, windows.max_bad)


@_command
def score(
    *,
    inputs: Annotated[list[str], typer.Argument(help="A run folder with windows, or documents.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the run. [default: INPUT, if it is one]")
    ] = None,
    model: ModelOptions,
    windows: WindowOptions,
    scores: ScoreOptions,
    engine: EngineOptions,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Score the windows of a run folder (or of documents, which are cut first)."""
    from longsift import pipeline

    _import_scoring()
    if dry_run:
        from longsift.planning import estimate, estimate_scores

        folder = pipeline.run_folder(inputs)
        pipeline.check_uncut(folder, windows)
        plan = estimate_scores(folder, model, scores) if folder else estimate(inputs, model, windows, scores)
        _print(plan, as_json)
        return
    pipeline.check_flags(pipeline.calculator_for(inputs, model), windows, scores)
    if engine.engine == "slurm":
        from longsift.engines import slurm

        slurm.check(out or inputs[0], scores, engine)
        parts = model, scores, engine
        folder, documents = pipeline.folder_to_score(inputs, out, windows, overwrite=overwrite)
        submitted = slurm.submit(folder, *parts, windows=windows, inputs=documents, overwrite=overwrite, quiet=quiet)
        _print(submitted, as_json)
        return
    cluster = _ray_cluster(scores, engine)
    folder, documents = pipeline.folder_to_score(inputs, out, windows, overwrite=overwrite)
    if documents is not None:
        pipeline.cut(documents, folder, model, windows, overwrite=overwrite, quiet=quiet, cluster=cluster)
    _print(pipeline.score(folder, model, scores, overwrite=overwrite, quiet=quiet, cluster=cluster), as_json)
    pipeline.check_bad(folder, windows.max_bad)


@_command
def select(
    *,
    out: Folder,
    selection: SelectOptions,
    alpha: Annotated[float | None, typer.Option(help="longattn: another weight of uniformity.")] = None,
    normalize: Annotated[str | None, typer.Option(help="longattn: zscore or minmax.")] = None,
    layer_aggregation: Annotated[str | None, typer.Option(help="ladm: mean or zscore.")] = None,
    without_set_aside: Annotated[
        bool, typer.Option("--without-set-aside", help="Select though shards that could not be scored are missing.")
    ] = False,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Keep the best windows of every group of a scored run; nothing is scored again."""
    from longsift import pipeline

    result = pipeline.select(
        out,
        selection,
        alpha=alpha,
        normalize=normalize,
        layer_aggregation=layer_aggregation,
        without_set_aside=without_set_aside,
    )
    _print(result, as_json)


@_command
def report(
    *,
    out: Folder,
    map_seconds: Annotated[
        float,
        typer.Option(help="Measure dependency maps of the windows on the page for so long, and keep them; 0: none."),
    ] = 60.0,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another run over the same windows, to compare with.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Write OUT/report.html, one page that shows what was kept and why."""
    from longsift import pipeline

    _print({"report": str(pipeline.report(out, map_seconds=map_seconds, against=against))}, as_json)


@_command
def view(
    *,
    out: Folder,
    model: ModelOptions,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Beyond this machine, whoever reaches it can read the run.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open a browser, where this machine has a screen.")
    ] = True,
    verbose: Verbose = 0,
) -> None:
    """Show the report, a table of all windows and any window under the lens in a browser; needs longsift[view]."""
    from longsift.view.server import serve

    serve(out, host=host, port=port, model=model, browser=browser)


@_command
def compare(
    *,
    out_a: Annotated[Path, typer.Argument(help="Folder of a scored run, A.", show_default=False)],
    out_b: Annotated[Path, typer.Argument(help="Folder of another one over the same windows, B.", show_default=False)],
    page: Annotated[Path | None, typer.Option("-o", "--out", help="The page. [default: OUT_B/compare.html]")] = None,
    shares: Annotated[
        str, typer.Option(help="Top shares of every group whose overlap is told.")
    ] = "0.05,0.125,0.25,0.5",
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Compare how two runs rank the same windows: correlation, overlap, and where they disagree, as a page."""
    from longsift import comparison
    from longsift.report.compare import write_comparison

    result = comparison.compare_runs(out_a, out_b, comparison.parse_shares(shares))
    where = {"page": str(write_comparison(result, page or out_b / "compare.html"))}
    _print((result.as_dict() if as_json else comparison.summary(result)) | where, as_json)


@_command
def inspect(
    *,
    source: Annotated[
        str,
        typer.Argument(
            help="A file of text or documents, - for text on standard input, or, with --run, a window_id.",
            show_default=False,
        ),
    ],
    run: Annotated[Path | None, typer.Option("--run", help="Folder of the run that has the window.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The page. [default: NAME.inspect.html]", show_default=False)
    ] = None,
    model: ModelOptions,
    options: InspectOptions,
    config: Config = None,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Show where one window draws on its far past, as a page: of a file, or of a run."""
    from longsift import inspection

    result = inspection.inspect(source, out, model, options, run=run)
    _print(result if as_json else inspection.summary(result), as_json)


@_command
def train_calculator(
    *,
    inputs: Inputs,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the model.", show_default=False)],
    training: TrainOptions,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw an earlier run in OUT away.")] = False,
    dry_run: DryRun = False,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Train a calculator on long windows: continue a causal language model, or begin one."""
    from longsift.training import calculator, estimate

    if dry_run:
        _print(estimate.estimate_training(inputs, training), as_json)
        return
    result = calculator.train_calculator(inputs, out, training, overwrite=overwrite, quiet=quiet)
    if result is not None:  # the first process speaks for all
        _print(result, as_json)


@_command
def evaluate(
    *,
    inputs: Inputs,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the measures and results.", show_default=False)],
    model: ModelOptions,
    control: ControlOptions,
    meter: MeterOptions,
    calibration: Annotated[
        str | None,
        typer.Option(help="File of `longsift calibrate`. Default: that of the embedded calculator."),
    ] = None,
    needle: Annotated[bool, typer.Option("--needle", help="Instead: ask the model for keys hidden in text.")] = False,
    needles: NeedleOptions,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Instead: loss of the model by position.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away measures of another model.")] = False,
    dry_run: DryRun = False,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Say which scores, layers and heads of a calculator tell real documents from controls made of them."""
    from longsift.evaluation import evaluate as evaluation
    from longsift.shards import write_json

    if dry_run:
        _print(evaluation.estimate(inputs, model, control, meter), as_json)
        return
    if needle or perplexity:
        from longsift.evaluation.needle import needle_test
        from longsift.evaluation.perplexity import perplexity as loss_by_position

        result: dict[str, Any] = {}
        if needle:
            result |= needle_test(inputs, model, control, meter, needles, quiet=quiet)
            write_json(out / "needle.json", result)
        if perplexity:
            result |= loss_by_position(inputs, model, control, meter, quiet=quiet)
            write_json(out / "perplexity.json", result)
        _print(result, as_json)
        return
    result = evaluation.evaluate(
        inputs, out, model, control, meter, calibration=calibration, overwrite=overwrite, quiet=quiet
    )
    _print(result if as_json else evaluation.summary(result) | {"page": str(out / "evaluation.html")}, as_json)


@_command
def calibrate(
    *,
    inputs: Inputs,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="File; one of the same model gets a fit for this window.", show_default=False),
    ],
    model: ModelOptions,
    control: ControlOptions,
    calibration: CalibrateOptions,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away FILE and what was measured.")] = False,
    dry_run: DryRun = False,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Choose and weigh the heads of a calculator for the method calibrated, on a sample of documents and controls."""
    if dry_run:
        from longsift.evaluation.evaluate import estimate

        fields = ("span", "device", "dtype", "rope_theta")
        meter = MeterOptions(method="calibrated", **{name: getattr(calibration, name) for name in fields})
        _print(estimate(inputs, model, control, meter), as_json)
        return
    from longsift.evaluation import calibration as evaluation

    result = evaluation.calibrate(inputs, out, model, control, calibration, overwrite=overwrite, quiet=quiet)
    _print(result if as_json else evaluation.summary(result), as_json)


@_command
def status(*, out: Folder, as_json: Json = False, verbose: Verbose = 0) -> None:
    """Show how far a run is; works while it goes on, from another shell."""
    from longsift.status import run_status

    _print(run_status(out), as_json)


@_command
def doctor(*, as_json: Json = False, verbose: Verbose = 0) -> None:
    """Say what this machine can do: devices, backends, libraries."""
    from longsift.status import machine

    _print(machine(), as_json)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"longsift {__version__}")
        raise typer.Exit


def _ray_cluster(scores: ScoreOptions, engine: EngineOptions) -> EngineOptions | None:
    """The Ray cluster that was asked for and is there; None where this machine is to score."""
    if engine.engine != "ray":
        return None
    from longsift.engines import ray_cluster

    ray_cluster.check(scores, engine)
    return engine


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    from longsift.summary import render

    render(result)


if __name__ == "__main__":
    app()
