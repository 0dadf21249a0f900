from __future__ import annotations

from pathlib import Path

from browser import Browser
from longsift.report.charts import axis, chart, heat_map, histogram
from longsift.report.rendering import _environment, in_script

PAGE = """{% extends "base.html.jinja" %}
{% block main %}<figure id="chart"></figure>{% endblock %}
{% block scripts %}<script>{{ chart_library() }}</script>
<script>
charts.draw(document.getElementById("chart"), {{ spec | in_script }}).then((view) => { window.view = view; });
</script>
{% endblock %}"""
BARS = chart(
    "Windows by score",
    data={"values": [{"from": i, "to": i + 1, "n": i} for i in range(8)]},
    params=[{"name": "cut", "value": 3}],
    layer=[
        {
            "mark": "bar",
            "encoding": {
                "x": axis("from", "score", bin={"binned": True}),
                "x2": {"field": "to"},
                "y": axis("n", "windows"),
                "fill": {"condition": {"test": "datum.from >= cut", "value": "var(--kept)"}, "value": "var(--rest)"},
            },
        }
    ],
)
FILLS = "[...document.querySelectorAll('.mark-rect path')].map((bar) => getComputedStyle(bar).fill)"


def write(path: Path, spec: dict[str, object]) -> Path:
    path.write_text(_environment().from_string(PAGE).render(spec=spec), encoding="utf-8")
    return path


def test_a_chart_is_drawn_without_eval_and_answers_signals(browser: Browser, tmp_path: Path) -> None:
    watched = browser.open(write(tmp_path / "page.html", BARS))
    watched.wait("window.view")
    assert len(set(watched.page.evaluate(FILLS))) == 2
    watched.page.evaluate("view.signal('cut', 9).runAsync().then(() => true)")
    assert len(set(watched.page.evaluate(FILLS))) == 1
    watched.check()


def test_a_chart_takes_the_colours_of_the_theme_without_being_drawn_anew(browser: Browser, tmp_path: Path) -> None:
    watched = browser.open(write(tmp_path / "page.html", BARS))
    watched.wait("window.view")
    light = watched.page.evaluate(FILLS)
    watched.page.emulate_media(color_scheme="dark")
    dark = watched.page.evaluate(FILLS)
    watched.page.emulate_media(color_scheme="dark", media="print")
    assert light[-1] == "rgb(15, 118, 110)"
    assert dark[-1] == "rgb(63, 181, 168)"
    assert watched.page.evaluate(FILLS)[-1] == light[-1]
    watched.check()


def test_a_heat_map_has_a_cell_for_each_bin_in_the_colour_of_most_of_its_windows(
    browser: Browser, tmp_path: Path
) -> None:
    cells = [
        {"x": 10**i, "x2": 10 ** (i + 1), "y": i / 9, "y2": (i + 1) / 9, "n": 10**i, "kept": 10**i if i > 2 else 0}
        for i in range(5)
    ]
    spec = heat_map("Map", cells, x="tokens", y="score", log_x=True)
    watched = browser.open(write(tmp_path / "page.html", spec))
    watched.wait("window.view")
    fills = watched.page.evaluate(FILLS)
    assert [fill == "rgb(15, 118, 110)" for fill in fills] == [False, False, False, True, True]
    watched.check()


def test_values_in_a_script_cannot_end_it() -> None:
    assert in_script({"a": "</script><!--\u2028&"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u2028\\u0026"}'


def test_a_histogram_takes_other_values_and_a_cut(browser: Browser, tmp_path: Path) -> None:
    bars = [{"x": i, "x2": i + 1, "n": 8 - i, "kept": i // 4} for i in range(8)]
    watched = browser.open(write(tmp_path / "page.html", histogram("Scores", bars, x="score")))
    watched.wait("window.view")
    assert len(watched.page.evaluate(FILLS)) == 16
    assert watched.page.locator(".role-mark.mark-rule line").count() == 0
    given = "view.data('bars', [{x: 2, x2: 3, n: 5, kept: 4}]).data('cut', [{x: 2.5}])"
    watched.page.evaluate(f"{given}.runAsync().then(() => true)")
    assert len(watched.page.evaluate(FILLS)) == 2
    assert watched.page.locator(".role-mark.mark-rule line").count() == 1
    watched.check()
