"""A run folder and its shards: what was asked, what is done, and what a restart may go on with.

A shard is the unit of work, retry and resume: a piece of a file that is cut into windows, or a file of windows that is
scored. Its tables are published whole or not at all
(`longsift.tables.publish`), and a small JSON record beside them, written last, says that it is done and what
it counted. Records hold times; tables do not, so that the same input gives the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from longsift import __version__
from longsift.errors import OutputError, ShardsSetAside
from longsift.jobs import check_ended
from longsift.sources import Piece, Source, listed_sources
from longsift.tables import publish

Stage = Literal["windows", "scores", "selected"]
_STAGES: tuple[Stage, ...] = ("windows", "scores", "selected")
_OUTPUTS: dict[Stage, tuple[str, ...]] = {
    "windows": ("windows", "quarantine", "shards/windows", "shards/begun", "shards/lines"),
    "scores": ("scores", "shards/scores", "shards/set-aside", "shards/now.json", "maps", "compare.html"),
    "selected": ("selected", "report.html"),
}
_NAMED = 5  # shards that a message names
_LOOKS = 5  # at a lock that another may hold for a moment


def piece_name(file: int, piece: int) -> str:
    """The shard of the windows stage that is a piece of a file, both counted from 0; its tables add a number."""
    return f"{file:05d}-{piece:05d}"


def plan_pieces(sources: Sequence[Source], piece_bytes: int) -> dict[str, Piece]:
    """The pieces that files are cut in, in order, by the names of their shards."""
    return {
        piece_name(number, index): piece
        for number, source in enumerate(sources)
        for index, piece in enumerate(source.pieces(piece_bytes))
    }


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, visible whole or not at all."""
    with publish(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class RunFolder:
    """The output folder of a run: its tables, its manifest and its shard records."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.scores = self.path / "scores"
        self.quarantine = self.path / "quarantine"
        self.selected = self.path / "selected"
        self.report = self.path / "report.html"
        self._manifest = self.path / "manifest.json"

    @property
    def windows(self) -> Path:
        """The windows table; another run's when this run scores the same windows."""
        return self.path / str(self.manifest().get("windows", {}).get("folder", "windows"))

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty for a folder in which nothing was run.

        Raises:
            OutputError: the file is not a manifest of longsift.
        """
        try:
            content = json.loads(self._manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise OutputError(f"{self._manifest} is damaged ({error}). Start again with --overwrite.") from error
        if not isinstance(content, dict) or "longsift" not in content:
            raise OutputError(f"{self._manifest} was not written by longsift. Choose another output folder.")
        return content

    def section(self, stage: Stage, *, incomplete: bool = False) -> dict[str, Any]:
        """The manifest's section of a finished stage.

        Args:
            incomplete: take one that ended with shards set aside.

        Raises:
            OutputError: the stage has not finished in this folder.
            ShardsSetAside: it ended with shards set aside.
        """
        section: dict[str, Any] = self.manifest().get(stage, {})
        if section.get("status") == "incomplete":
            if incomplete:
                return section
            raise ShardsSetAside(self.explain_set_aside())
        if section.get("status") != "done":
            needed = {
                "windows": "longsift windows",
                "scores": "longsift score",
                "selected": "longsift select",
            }
            raise OutputError(f"{self.path} has no finished {stage}. Run '{needed[stage]}' first.")
        return section

    def pieces(self) -> dict[str, Piece]:
        """The pieces of files that the windows stage was begun with, by their shards."""
        identity = self.manifest()["windows"]["identity"]
        return plan_pieces(listed_sources(identity["inputs"]), identity["piece_bytes"])

    def begin(self, stage: Stage, identity: dict[str, Any], *, overwrite: bool = False) -> bool:
        """Start or continue a stage; returns True when it is already done.

        Args:
            identity: everything that the stage's tables depend on, as JSON values.
            overwrite: throw away what this stage and the later ones hold.

        Raises:
            OutputError: the folder holds the same stage of another identity, or jobs of a cluster still work in it.
        """
        manifest = self.manifest()
        section = manifest.get(stage)
        identity = json.loads(json.dumps(identity))
        if section and section["identity"] != identity and not overwrite:
            details = "; ".join(_changes(section["identity"], identity))
            raise OutputError(
                f"{self.path} holds {stage} of another run ({details}). "
                "Choose another output folder, or throw the old tables away with --overwrite."
            )
        if section and not overwrite and section["status"] == "done":
            return True
        check_ended(self.path)
        if section and not overwrite:
            if section["status"] == "incomplete":
                section["status"] = "running"
                manifest.pop("selected", None)  # it lacks what may come now: the report must not be of both
                self._write(manifest)
        else:
            for later in _STAGES[_STAGES.index(stage) :]:
                manifest.pop(later, None)
                self.clear(later)
            manifest[stage] = {"status": "running", "started": time.time(), "identity": identity}
            self._write(manifest)
        for leftover in self.path.rglob(".*.tmp"):  # of a run that was killed; the lock is ours
            leftover.unlink()
        return False

    def finish(self, stage: Stage, results: dict[str, Any], *, incomplete: bool = False) -> None:
        """Mark a stage as done, or as ended with shards set aside, with what it counted."""
        manifest = self.manifest()
        status = "incomplete" if incomplete else "done"
        manifest[stage] |= {"status": status, "finished": time.time(), **results}
        self._write(manifest)

    def replace(self, stage: Stage, section: dict[str, Any]) -> None:
        """Write the whole section of a stage that is done anew each time, or elsewhere."""
        self._write(self.manifest() | {stage: {"status": "done", "finished": time.time(), **section}})

    def check_linked_windows(self) -> None:
        """Refuse windows of another run that were cut anew since this run took them.

        Raises:
            OutputError: they were.
        """
        section = self.manifest().get("windows", {})
        if "folder" in section:
            source = RunFolder(self.windows.parent).manifest().get("windows", {})
            if source.get("finished") != section["finished"]:
                raise OutputError(
                    f"The windows in {self.windows} were cut anew since {self.path} took them. Score them again: "
                    f"longsift score {self.windows.parent} -o {self.path} --overwrite."
                )

    def clear(self, stage: Stage) -> None:
        """Remove a stage's tables and records."""
        for name in _OUTPUTS[stage]:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def record(self, stage: Stage, shard: str, content: dict[str, Any]) -> None:
        """Write the record that says a shard is done."""
        write_json(self.path / "shards" / stage / f"{shard}.json", content)
        if stage == "windows":
            (self.path / "shards" / "begun" / f"{shard}.json").unlink(missing_ok=True)

    def records(self, stage: Stage) -> dict[str, dict[str, Any]]:
        """The records of the finished shards of a stage, by shard, in order."""
        folder = self.path / "shards" / stage
        return {path.stem: _read_json(path) for path in sorted(folder.glob("*.json"))}

    def mark_place(self, shard: str, content: dict[str, Any]) -> None:
        """Write how far a shard of the windows stage is cut."""
        write_json(self.path / "shards" / "begun" / f"{shard}.json", content)

    def note_lines(self, shard: str, lines: int) -> None:
        """Write how many lines of its file begin in a shard of the windows stage."""
        write_json(self.path / "shards" / "lines" / f"{shard}.json", lines)

    def line_counts(self) -> dict[str, int]:
        """How many lines of its file begin in each shard of the windows stage, where that was noted."""
        paths = (self.path / "shards" / "lines").glob("*.json")
        return {path.stem: _read_json(path) for path in paths}

    def places(self) -> dict[str, dict[str, Any]]:
        """How far the shards of the windows stage are cut that are begun and not done."""
        places: dict[str, dict[str, Any]] = {}
        for path in sorted((self.path / "shards" / "begun").glob("*.json")):
            # A process may end between its record and the end of its place.
            if not (self.path / "shards" / "windows" / path.name).exists():
                with suppress(FileNotFoundError):  # it is done now
                    places[path.stem] = _read_json(path)
        return places

    def forget_places(self) -> None:
        """All shards of the windows stage are done."""
        shutil.rmtree(self.path / "shards" / "begun", ignore_errors=True)

    def set_aside(self, shard: str, reason: str) -> None:
        """Write the record that says that a shard of the scores stage could not be done, and why."""
        (self.path / "shards" / "scores" / f"{shard}.json").unlink(missing_ok=True)  # of a table that vanished
        write_json(self.path / "shards" / "set-aside" / f"{shard}.json", {"reason": reason, "when": time.time()})

    def shards_set_aside(self) -> dict[str, str]:
        """The shards that the scores stage has set aside since it was last begun, in order, with the reason."""
        paths = sorted((self.path / "shards" / "set-aside").glob("*.json"))
        return {path.stem: _read_json(path)["reason"] for path in paths}

    def explain_set_aside(self) -> str:
        """Which shards are set aside and why, and what to do, in words."""
        shards = self.shards_set_aside()
        named = [f"{name} ({reason})" for name, reason in list(shards.items())[:_NAMED]]
        if len(shards) > _NAMED:
            named.append(f"{len(shards) - _NAMED:,} more, which 'longsift status {self.path}' lists")
        return (
            f"{len(shards):,} shards of scores in {self.path} are set aside, each tried twice: {'; '.join(named)}. All "
            "others are scored. The command that scored them, run again, tries these once more and nothing else; "
            f"'longsift select {self.path} --without-set-aside' selects without them."
        )

    def forget_set_aside(self) -> None:
        """Let the shards that were set aside be tried again."""
        shutil.rmtree(self.path / "shards" / "set-aside", ignore_errors=True)

    def note(self, content: dict[str, Any]) -> None:
        """Write what the scores stage is at now, for `longsift status`."""
        write_json(self.path / "shards" / "now.json", content)

    def noted(self) -> dict[str, Any]:
        """What the scores stage is at now; empty when it does not say, or no longsift works in the folder."""
        try:
            content: dict[str, Any] = json.loads((self.path / "shards" / "now.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return content if self.is_being_written() else {}

    def forget_note(self) -> None:
        """The scores stage is at nothing any more."""
        (self.path / "shards" / "now.json").unlink(missing_ok=True)

    def is_being_written(self) -> bool:
        """Whether a longsift holds the folder's lock now, on any machine that shares its file system's locks."""
        try:
            with (self.path / ".lock").open(encoding="utf-8") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for writing; the operating system lets go of it however the process ends.

        Raises:
            OutputError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as handle:
            try:
                self._lock(handle)
            except BlockingIOError as error:
                handle.seek(0)
                raise OutputError(
                    f"Another longsift (process {handle.read().strip() or 'unknown'}) is writing in {self.path}. "
                    "Wait for it to end, or choose another output folder."
                ) from error
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            yield

    def _lock(self, handle: IO[str]) -> None:
        for look in range(_LOOKS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:  # perhaps it is only `is_being_written`, which lets go at once
                if look == _LOOKS - 1:
                    raise
            time.sleep(0.02)

    def _write(self, manifest: dict[str, Any]) -> None:
        write_json(self._manifest, {"longsift": __version__, **{k: manifest[k] for k in _STAGES if k in manifest}})


def _changes(known: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(known | asked):
        before, after = known.get(key), asked.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {_brief(before)} → {_brief(after)}"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
