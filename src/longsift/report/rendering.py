"""Pages that need nothing else: templates, which escape every value, and the charting library, which is inlined.

Charts are Vega-Lite specifications, plain dictionaries made in Python. The library's bundle comes from vl-convert, 0.9
MB of JavaScript, in a page once. With `{ast: true}` it runs without `eval`, which the pages' content security policy
forbids, as it does any request; expressions of a specification are interpreted.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from longsift.report import words


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("longsift.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": words.count,
        "tokens": words.tokens,
        "number": words.number,
        "spread": words.spread,
        "share": words.share,
        "plain": words.plain,
        "brief": words.brief,
        "in_script": in_script,
    }
    environment.globals |= {"chart_library": chart_library, "script_file": script_file}
    return environment


def render(template: str, **values: Any) -> str:
    """A page of one of this package's templates, which extend `base.html.jinja`.

    Every value is escaped; `value | plain` also shows characters that would not be seen or would turn the line around,
    and `value | in_script` is for what a script of the page reads. `chart_library()` and `script_file(name)` are
    scripts.
    """
    return _environment().get_template(template).render(**values)


def in_script(value: Any) -> Markup:
    """A value as JSON that may stand in a `<script>` element: no text in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@functools.cache
def chart_library() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script, and `charts.js`, which draws with them; takes a second to make.

    A page's own script, in a `<script>` element after it, has `charts.draw(element, specification)` and more.
    """
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;") + "\n" + str(script_file("charts.js"))
    return Markup(script.replace("</script", "<\\/script"))


def script_file(name: str) -> Markup:
    """A script that lies beside the templates, to stand in a `<script>` element."""
    return Markup((resources.files("longsift.report") / name).read_text(encoding="utf-8"))
