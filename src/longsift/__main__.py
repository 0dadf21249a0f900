"""`python -m longsift`, as launchers such as torchrun start it."""

from longsift.cli import app

app(prog_name="longsift")
