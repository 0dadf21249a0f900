"""Write docs/cli.md from the command line itself: `python docs/make_cli.py`. A test fails when it is out of date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from longsift.cli import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Written by `python docs/make_cli.py`. Data goes to files or stdout, logs and progress to stderr. Exit codes: 0 done,
1 failed or too many bad rows, 2 usage, 130 interrupted, 143 ended by SIGTERM (the same command goes on where it
stopped). A flag that `--config FILE` sets is a `flag: value` line of the YAML file; flags on the command line win.
"""


def render() -> str:
    """The page as Markdown."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in group.commands.items():
        parts.append(f"## longsift {name}\n\n{command.help}\n")
        rows = [_row(parameter) for parameter in command.params]
        parts.append("| flag | what it does | default |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        flag = parameter.name.upper()
    else:
        flag = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    shown = "" if default in (None, False, 0) or callable(default) or parameter.required else f"`{default}`"
    return f"| {flag} | {parameter.help or ''} | {shown} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
