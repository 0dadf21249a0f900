"""The report of a run from documents to the page: the maps of its windows, and another run beside it."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from browser import Browser
from longsift import pipeline
from longsift.calculators.first_layer import FirstLayer
from longsift.comparison import compare_runs
from longsift.errors import OutputError, UsageError
from longsift.inspection.maps import dependency_map, quantise
from longsift.options import ModelOptions, ScoreOptions, SelectOptions, WindowOptions
from longsift.report.words import number, share

MAPS = re.compile(r'<canvas width="(\d+)" height="\d+" data-map="([^"]+)"')


@pytest.fixture(scope="module")
def run(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "longattn"
    pipeline.run(
        [str(corpus)],
        out,
        ModelOptions(model=str(model)),
        WindowOptions(window=512),
        ScoreOptions(method="longattn"),
        SelectOptions(keep=0.3),
        quiet=True,
    )
    return out


def test_a_run_measures_no_map_until_it_is_asked_to(run: Path) -> None:
    html = (run / "report.html").read_text("utf-8")
    assert not (run / "maps").exists()
    assert not MAPS.findall(html)
    assert "longsift report --map-seconds" in html


def test_the_windows_shown_have_maps_that_a_second_report_does_not_measure_again(
    run: Path, model: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pipeline.report(run, map_seconds=60)
    html = path.read_text("utf-8")
    shown = MAPS.findall(html)
    assert len(shown) == html.count('<span class="rank">') > 6
    first = re.findall(r"<span>(\S+), row (\d+)</span></div>", html)[0]
    table = pq.read_table(run / "windows" / f"{first[0]}.parquet")
    ids = table["input_ids"][int(first[1].replace(",", ""))].as_py()
    shares = dependency_map(FirstLayer.load(str(model)), ids, span=64).mean()
    assert int(shown[0][0]) == len(shares) == 8
    assert base64.b64decode(shown[0][1]) == quantise(shares[np.tril_indices(8)]).tobytes()

    watched = browser.open(path)
    watched.wait("document.documentElement.dataset.drawn")
    painted = "new Set(document.querySelector('[data-map]').getContext('2d').getImageData(0, 0, 8, 8).data).size"
    assert watched.page.evaluate(painted) > 4
    watched.check()

    monkeypatch.setattr("longsift.inspection.inspector.Inspector.of_run", None)  # which a second one does without
    assert pipeline.report(run, map_seconds=60).read_text("utf-8") == html
    assert pipeline.report(run).read_text("utf-8") == html


def test_maps_that_cannot_be_measured_leave_a_report_and_a_warning(
    corpus: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = tmp_path / "model"
    moved.mkdir()
    for file in model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    options = ModelOptions(model=str(moved)), WindowOptions(window=512, sample=4), ScoreOptions(method="longattn")
    pipeline.run([str(corpus)], tmp_path / "run", *options, quiet=True)
    moved.rename(tmp_path / "elsewhere")
    html = pipeline.report(tmp_path / "run", map_seconds=60).read_text("utf-8")
    assert not MAPS.findall(html)
    assert "the report has no dependency maps" in caplog.text


def test_another_method_is_shown_beside_with_its_agreement_at_the_cut(run: Path, browser: Browser) -> None:
    other = run.parent / "ladm"
    pipeline.folder_to_score([str(run)], other)
    pipeline.score(other, ModelOptions(), ScoreOptions(method="ladm", span=16, d_afs=2, d_cds=2), quiet=True)
    watched = browser.open(pipeline.report(run, against=other))
    watched.wait("document.documentElement.dataset.drawn")
    rows = watched.page.evaluate("[...document.querySelectorAll('#agreement tbody tr')].map((row) => row.innerText)")
    expected = compare_runs(run, other, [0.3])
    assert [row.split("\t") for row in rows] == [
        [
            group.group,
            str(group.windows),
            number(group.spearman),
            str(group.overlaps[0].kept),
            share(group.overlaps[0].overlap),
            share(group.overlaps[0].chance),
        ]
        for group in expected.groups
    ]
    assert watched.page.locator("#ranks svg").count() == 1
    watched.check()


def test_a_report_against_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        pipeline.report(run, against=tmp_path)
    with pytest.raises(UsageError, match="--map-seconds"):
        pipeline.report(run, map_seconds=-1)
