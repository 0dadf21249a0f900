from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of the small random checkpoint of a family, made once a session."""
    root: Path = tmp_path_factory.mktemp("checkpoints")

    def of(family: str) -> str:
        folder = root / family
        return str(folder if folder.exists() else make_checkpoint(folder, family))

    return of
