"""Calibrations: which heads are chosen, how they are weighed, and on what they are tested."""

from __future__ import annotations

import json
import pydoc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from checkpoints import make_checkpoint
from conftest import library_text
from longsift.cli import app
from longsift.errors import InputError, UsageError
from longsift.evaluation import calibration
from longsift.evaluation.auc import auc
from longsift.evaluation.calibration import (
    COUNTS,
    Table,
    by_documents,
    by_groups,
    by_kinds,
    calibrate_signals,
    choose_heads,
    fit_linear,
)
from longsift.evaluation.evaluate import calibrated_scores
from longsift.evaluation.signals import Signals
from longsift.methods.calibrated import STATISTICS, Calibration
from longsift.options import CalibrateOptions
from longsift.tables import parquet_files

LAYERS, HEADS, N_LAYERS = tuple(range(8)), 3, 8
SEEING = [(1, 2), (3, 0), (4, 1)]  # of 24 heads
GROUPS = ("book", "code", "law")
FAR, NEAR, SPREAD = (STATISTICS.index(name) for name in ("far", "near", "spread"))
CHOOSING = CalibrateOptions(heads=3, folds=2, max_depth=1.0)


def make_signals(
    seed: int = 0,
    seeing: Sequence[tuple[int, int]] = SEEING,
    kinds: Sequence[str] = ("mixed", "shuffled", "degenerate/csv", "degenerate/hex"),
    per_group: int = 16,
    folds: int = 2,
) -> Signals:
    """Windows in which `seeing` heads look farther than in controls, and every other head is blind.

    Generated text has less far mass in these heads too; `degenerate/odd` has more, and only `near` gives it away.
    """
    chance = np.random.default_rng(seed)
    rows = []
    for kind in ("coherent", *kinds):
        for group in ("",) if kind.startswith("degenerate") else GROUPS:
            rows += [(kind, group, f"{kind}-{group}-{i}", i % folds) for i in range(per_group)]
    kind, group, doc_id, fold = (np.array(column) for column in zip(*rows, strict=True))
    logs = chance.normal(-3, 0.4, (len(rows), len(LAYERS), HEADS, len(STATISTICS)))
    for name in GROUPS:  # groups differ from each other, which a score within groups should not mind
        logs[group == name] += chance.normal(0, 0.3, logs.shape[1:])
    for layer, head in seeing:
        logs[(kind != "coherent") & (kind != "shuffled"), layer, head, FAR] -= 1.2
        logs[kind == "degenerate/odd", layer, head, FAR] += 1.2 + 0.6
        logs[kind == "degenerate/odd", layer, head, NEAR] += 4.0
    samples = {"kind": kind, "group": group, "doc_id": doc_id, "fold": fold, "key": np.arange(len(rows)).astype(str)}
    return Signals(samples, LAYERS, {"heads": np.exp(logs)}, {"span": 16, "length": 400})


@pytest.fixture(scope="module")
def signals() -> Signals:
    return make_signals()


@pytest.fixture(scope="module")
def fit(signals: Signals):
    return calibrate_signals(signals, CHOOSING, N_LAYERS)


class TestChoosing:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_finds_the_heads_that_see(self, seed: int) -> None:
        table = Table.of(make_signals(seed))
        assert [table.heads[i] for i in choose_heads(table, 3, 2.0)] == SEEING

    def test_a_fit_holds_the_chosen_heads_and_no_others(self, fit) -> None:
        assert fit.heads == {1: [2], 3: [0], 4: [1]}
        assert len(fit.features) == 3 * len(STATISTICS)
        assert (fit.window, fit.span) == (400, 16)

    def test_separates_documents_that_were_never_drawn(self, fit) -> None:
        others = make_signals(seed=9)
        scores, kind = calibrated_scores(others, fit), others.samples["kind"]
        for control in ("mixed", "degenerate/csv"):
            for group in GROUPS:
                good = (kind == "coherent") & (others.samples["group"] == group)
                bad = (kind == control) & np.isin(others.samples["group"], [group, ""])
                assert auc(scores[good], scores[bad]) > 0.95

    def test_is_the_same_each_time(self, signals: Signals, fit) -> None:
        assert calibrate_signals(signals, CHOOSING, N_LAYERS) == fit

    def test_takes_shallow_heads_where_deep_ones_are_no_better(self) -> None:
        both = [(0, 1), (1, 2), (2, 0), (6, 1), (7, 0), (7, 2)]
        fit = calibrate_signals(make_signals(seeing=both), CHOOSING, N_LAYERS)
        assert fit.heads == {0: [1], 1: [2], 2: [0]}

    def test_goes_deep_where_only_deep_heads_see(self) -> None:
        fit = calibrate_signals(make_signals(seeing=[(6, 1), (7, 0), (7, 2)]), CHOOSING, N_LAYERS)
        assert fit.heads == {6: [1], 7: [0, 2]}

    def test_stays_within_the_depth_it_is_given(self) -> None:
        few = CalibrateOptions(heads=3, folds=2, max_depth=0.5)
        fit = calibrate_signals(make_signals(seeing=[(1, 0), (7, 0)]), few, N_LAYERS)
        assert max(fit.heads) <= 3

    def test_one_fold_cannot_be_tested(self) -> None:
        with pytest.raises(UsageError, match="--folds of at least 2"):
            calibrate_signals(make_signals(folds=1, per_group=4), CHOOSING, N_LAYERS)

    def test_without_a_global_layer_that_shallow_the_depth_is_named(self, signals: Signals) -> None:
        deep = Signals(signals.samples, tuple(layer + 24 for layer in LAYERS), signals.values, signals.about)
        with pytest.raises(UsageError, match=r"at 0\.78 of the depth; raise --max-depth"):
            calibrate_signals(deep, CalibrateOptions(max_depth=0.5), 32)


class TestWeights:
    def test_a_head_that_sees_is_weighed_up_and_a_blind_one_hardly(self, signals: Signals) -> None:
        table = Table.of(signals)
        linear = fit_linear(table, 2.0)
        seeing = [table.heads.index(place) for place in SEEING]
        blind = np.setdiff1d(np.arange(len(table.heads)), seeing)
        assert (linear.weight[seeing, FAR] > 5 * np.abs(linear.weight[blind]).mean()).all()

    def test_a_statistic_that_is_off_on_either_side_counts_against_a_window(self) -> None:
        """Half of the controls have far too much of it and half far too little: no straight line tells them apart."""
        signals = make_signals(seeing=[], kinds=("degenerate/csv",), per_group=40)
        junk = np.flatnonzero(signals.samples["kind"] == "degenerate/csv")
        signals.values["heads"][junk, 0, 0, SPREAD] *= np.where(np.arange(len(junk)) % 2, 20.0, 0.05)
        table = Table.of(signals)
        linear = fit_linear(table.take([0]), 8.0)
        assert linear.square[0, SPREAD] < -5 * abs(linear.weight[0, SPREAD])
        scores = linear.score(table.take([0]))
        assert auc(scores[table.kind == "coherent"], scores[table.kind != "coherent"]) > 0.9

    def test_controls_of_other_groups_are_compared_too(self) -> None:
        """Within `code` the head is blind; only against books does it see that mixed code does not hang together."""
        signals = make_signals(seeing=[], kinds=("mixed",))
        kind, group = signals.samples["kind"], signals.samples["group"]
        rows = (kind == "coherent") & (group != "law") | (kind == "mixed") & (group == "code")
        signals.values["heads"][group == "code", 0, 0, FAR] = 0.01
        signals.values["heads"][group == "book", 0, 0, FAR] = 0.1
        weight = fit_linear(Table.of(signals.where(rows)), 2.0).weight
        assert weight[0, FAR] == pytest.approx(np.abs(weight).max())
        own = rows & (group == "code")
        assert fit_linear(Table.of(signals.where(own)), 2.0).weight[0, FAR] == pytest.approx(0, abs=1e-6)

    def test_the_number_of_windows_of_a_kind_does_not_decide(self) -> None:
        few = make_signals(seeing=SEEING, per_group=12)
        of_csv = np.flatnonzero(few.samples["kind"] == "degenerate/csv")
        many = few.where(np.concatenate([np.arange(len(few)), *[of_csv] * 9]))
        one, ten = (fit_linear(Table.of(some), 2.0).weight for some in (few, many))
        assert np.abs(one - ten).max() < 0.2 * np.abs(one).max()

    def test_a_documents_own_segments_in_another_order_are_measured_and_not_trained_on(self) -> None:
        assert COUNTS["shuffled"] == 0
        with pytest.raises(InputError, match="no control to train on: the kinds are shuffled"):
            fit_linear(Table.of(make_signals(kinds=("shuffled",))), 2.0)


class TestTesting:
    @pytest.mark.parametrize("split", [by_documents, by_groups, by_kinds], ids=lambda split: split.__name__)
    def test_nothing_is_tested_on_what_it_was_fitted_on(self, signals: Signals, split) -> None:
        table = Table.of(signals)
        parts = split(table)
        assert len(parts) == {"by_documents": 2, "by_groups": 3, "by_kinds": 2}[split.__name__]
        for seen, unseen in parts:
            assert not (seen & unseen).any()
            assert not set(table.doc_id[seen]) & set(table.doc_id[unseen])
            assert {"coherent"} < set(table.kind[unseen])
            if split is by_groups:
                assert not set(table.group[seen]) & set(table.group[unseen]) - {""}
            if split is by_kinds:
                assert not set(table.kind[seen]) & set(table.kind[unseen]) - {"coherent"}

    def test_figures_are_of_unseen_documents_groups_and_kinds(self, fit) -> None:
        assert fit.figures["windows"] == {
            "coherent": 48, "mixed": 48, "shuffled": 48, "degenerate/csv": 16, "degenerate/hex": 16,
        }  # fmt: skip
        for name in ("unseen_documents", "unseen_groups"):
            figures = fit.figures[name]
            assert set(figures) == {"mixed", "shuffled", "degenerate"}
            assert set(figures["mixed"]) == {*GROUPS, "mean"}
            value, low, high = figures["mixed"]["mean"]
            assert low <= value <= high
            assert value > 0.95
            assert 0.3 < figures["shuffled"]["mean"][0] < 0.7  # nothing in these windows tells them apart
        assert set(fit.figures["unseen_kinds"]) == {"csv", "hex"}
        assert min(fit.figures["unseen_kinds"].values()) > 0.9

    def test_a_kind_unlike_all_others_passes_where_it_was_not_shown_and_the_figures_say_so(self) -> None:
        odd = make_signals(kinds=("mixed", "degenerate/csv", "degenerate/odd"), per_group=24)
        figures = calibrate_signals(odd, CHOOSING, N_LAYERS).figures
        assert figures["unseen_documents"]["degenerate"]["mean"][0] > 0.9
        assert figures["unseen_kinds"]["csv"] > 0.9
        assert figures["unseen_kinds"]["odd"] < 0.6

    def test_the_mean_counts_kinds_as_in_training_and_groups_alike(self) -> None:
        auc = {
            ("book", "mixed"): 0.9,
            ("code", "mixed"): 0.7,
            ("book", "shuffled"): 0.0,
            ("book", "degenerate/a"): 1.0,
            ("book", "degenerate/b"): 0.5,
        }
        assert calibration.Tested(auc, {}).mean() == pytest.approx(
            (2 * 0.9 + 2 * 0.7 + 0.5 * 1.0 + 0.5 * 0.5) / (2 + 2 + 0.5 + 0.5)
        )


SMALL = ["--span", "16", "--segment", "32", "--folds", "2", "--per-kind", "2", "--heads", "4"]
SMALL += ["--kinds", "mixed,degenerate/uuids,degenerate/csv", "--max-depth", "1", "--device", "cpu", "-q"]


def longsift(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


class TestCommand:
    @pytest.fixture(scope="class")
    def documents(self, tmp_path_factory) -> Path:
        """Ten documents in each of two groups, so that both folds have several of both."""
        path = tmp_path_factory.mktemp("documents") / "rows.jsonl"
        texts = {"code": library_text("argparse.py"), "prose": pydoc.render_doc("argparse", renderer=pydoc.plaintext)}
        rows = [
            {"id": f"{group}-{i}", "source": group, "text": text[i * 2_500 : (i + 1) * 2_500]}
            for group, text in texts.items()
            for i in range(10)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    @pytest.fixture(scope="class")
    def made(self, model: Path, documents: Path, tmp_path_factory) -> tuple[Path, dict]:
        """A calibration of the small model for windows of 256 and of 320 tokens, and what the second one printed."""
        path = tmp_path_factory.mktemp("calibration") / "c.json"
        command = ["calibrate", documents, "-o", path, "--model", model, *SMALL]
        shown = longsift(*command, "--window", 256)
        assert "AUC on unseen documents (95 % interval)" in shown
        return path, json.loads(longsift(*command, "--window", 320, "--json"))

    def test_writes_a_fit_for_each_window_length(self, made: tuple[Path, dict]) -> None:
        path, result = made
        fits = Calibration.read(path).fits
        assert [fit.window for fit in fits] == [256, 320]
        assert all(sum(map(len, fit.heads.values())) == 4 for fit in fits)
        assert result["calibration"] == str(path)
        assert result["unseen_documents"] == json.loads(json.dumps(fits[1].figures["unseen_documents"]))

    def test_again_measures_nothing_and_writes_the_same_bytes(
        self, made: tuple[Path, dict], model: Path, documents: Path
    ) -> None:
        path, _ = made
        before = path.read_bytes()
        parts = [part for length in (256, 320) for part in parquet_files(Path(f"{path}.signals-{length}") / "signals")]
        times = [part.stat().st_mtime_ns for part in parts]
        longsift("calibrate", documents, "-o", path, "--model", model, *SMALL, "--window", 256)
        assert path.read_bytes() == before
        assert [part.stat().st_mtime_ns for part in parts] == times

    def test_scores_with_it(self, made: tuple[Path, dict], model: Path, documents: Path, tmp_path: Path) -> None:
        path, _ = made
        longsift(
            "run",
            documents,
            "-o",
            tmp_path,
            "--model",
            model,
            "--calibration",
            path,
            "--window",
            256,
            "--keep",
            0.5,
            "-q",
        )
        rows = [row for part in parquet_files(tmp_path / "scores") for row in pq.read_table(part).to_pylist()]
        assert {row["status"] for row in rows} == {"ok"}
        assert len({row["calibrated"] for row in rows}) > len(rows) / 2

    def test_a_file_of_another_model_is_not_written_over(
        self, made: tuple[Path, dict], model: Path, documents: Path, tmp_path: Path
    ) -> None:
        other = make_checkpoint(tmp_path / "other", "qwen2", vocab_size=512)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (other / name).write_bytes((model / name).read_bytes())
        path, _ = made
        command = ["calibrate", documents, "-o", path, "--model", other, *SMALL, "--window", 256]
        assert "is a calibration of" in longsift(*command, code=1)
        assert "another set of weights" in longsift(
            "score", documents, "-o", tmp_path / "o", "--model", other, "--calibration", path, "--window", 256, code=2
        )

    def test_a_dry_run_says_how_long_it_takes(self, model: Path, documents: Path, tmp_path: Path) -> None:
        command = ["calibrate", documents, "-o", tmp_path / "c.json", "--model", model, *SMALL, "--window", 256]
        plan = json.loads(longsift(*command, "--dry-run", "--json"))
        assert plan["controls"] == plan["coherent"] + 4
        assert not list(tmp_path.iterdir())
