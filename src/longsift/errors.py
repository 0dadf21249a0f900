"""The exceptions of longsift, one tree; every message names the fix.

LongsiftError
├── UsageError             a flag or argument that cannot work            (exit 2)
├── InputError             a source of documents that cannot be read
├── ModelError             a calculator that cannot be loaded or used
│   └── UnsupportedModel   an architecture whose attention cannot be measured
├── OutputError            an output folder that holds something else
├── ProcessLost            a process of a run that ended before its work was done
├── ShardsSetAside         shards that could not be scored; everything else was done
└── TooManyBadRows         more rows were quarantined than --max-bad allows
"""

from __future__ import annotations


class LongsiftError(Exception):
    """Base of every error that longsift raises on purpose; its text is meant for the user."""

    exit_code = 1


class UsageError(LongsiftError):
    """A flag, argument or combination of them that cannot work."""

    exit_code = 2


class InputError(LongsiftError):
    """A source of documents that does not exist or cannot be read as what it claims to be."""


class ModelError(LongsiftError):
    """A calculator that cannot be found, loaded or run on the given windows."""


class UnsupportedModel(ModelError):
    """An architecture whose queries and keys cannot be measured faithfully."""


class OutputError(LongsiftError):
    """An output folder that holds another run, or a table that is damaged."""


class ProcessLost(LongsiftError):
    """A process that worked for a run ended by itself, and trying again did not help."""


class ShardsSetAside(LongsiftError):
    """Shards that could not be scored, tried twice; everything else was still done."""


class TooManyBadRows(LongsiftError):
    """More rows were quarantined than the user allowed; everything else was still done."""
