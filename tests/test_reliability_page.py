"""docs/reliability.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE)


def test_every_named_test_is_there_and_slow_where_the_page_says_so():
    assert len(NAMED) > 20
    for file, name in NAMED:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{file}::{name}"
        assert ("pytestmark = [\n    pytest.mark.slow" in source) == (f"*slow* `{file}::{name}`" in PAGE), name


def test_every_promise_has_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert rows
    assert all("::test_" in row for row in rows)
