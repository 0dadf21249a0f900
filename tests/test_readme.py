"""What the README shows works as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from longsift.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands


def blocks(language: str) -> list[str]:
    return [
        body
        for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
        if name == language
    ]


def shown_commands() -> list[str]:
    text = "".join(blocks("")).replace("\\\n", " ")
    return [line.partition("#")[0] for line in text.splitlines() if line.startswith("longsift ")]


def test_the_python_example_runs(capsys):
    example = next(block for block in blocks("python") if "import longsift" in block)
    exec(compile(example, "README.md", "exec"), {})
    assert "'rank': 1" in capsys.readouterr().out


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_that_is_shown_exists_with_its_flags(command):
    _, name, *arguments = shlex.split(command)
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("-")} <= known


def test_the_shown_test_command_is_the_one_that_must_pass():
    assert "make test " in README
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_shown_speed_is_the_measured_one():
    results = json.loads((ROOT / "benchmarks" / "results" / "attention_cpu.json").read_text())["results"]
    longattn = next(result for result in results if result["case"].startswith("LongAttn"))
    seconds, peak = longattn["seconds"], longattn["peak_bytes"]
    assert f"take {seconds['ours']:.1f} s on two cores" in README
    assert f"{seconds['published'] / seconds['ours']:.0f} times faster" in README
    assert peak["published"] > 40 * peak["ours"]
