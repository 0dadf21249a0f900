from __future__ import annotations

from pathlib import Path

from browser import Browser
from longsift.report.charts import axis, chart, heat_map
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


def test_a_heat_map_has_a_cell_for_each_bin(browser: Browser, tmp_path: Path) -> None:
    cells = [{"x": i, "x2": i + 1, "y": i / 9, "y2": (i + 1) / 9, "n": 10**i} for i in range(5)]
    watched = browser.open(
        write(tmp_path / "page.html", heat_map("Map", cells, x="tokens", y="score", count="windows"))
    )
    watched.wait("window.view")
    assert watched.page.locator(".mark-rect path").count() == 5
    watched.check()


def test_values_in_a_script_cannot_end_it() -> None:
    assert in_script({"a": "</script><!--\u2028&"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u2028\\u0026"}'
