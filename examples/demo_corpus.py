"""Make a corpus of long documents from text that is on any machine with Python: `python demo_corpus.py OUT.jsonl.zst`.

Four groups: `code`, whole packages of the standard library; `manual`, the documentation that pydoc renders for
its modules, and the language reference that ships with pydoc; `package`, the sources of installed packages;
`mixed`, a control made here: functions of many modules, shuffled and joined, long but without long-range dependency.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import pydoc
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zstandard

SHORTEST, LONGEST = 30_000, 100_000  # characters of a document
CODE = "asyncio collections concurrent ctypes email http importlib json logging multiprocessing unittest urllib xml"
MANUAL = (
    "argparse builtins decimal socket typing logging pathlib subprocess email.message unittest.mock datetime turtle"
)
PACKAGES = "jinja2 fsspec rich typer huggingface_hub safetensors yaml duckdb pyarrow tokenizers numpy"
MIXED, MIXED_LENGTH = 12, 60_000  # documents, characters of each


def sources(folder: Path) -> str:
    """The Python files of a package, in path order, each after a `# path` line."""
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
    files = [file for file in files if not {"test", "tests", "idle_test"} & set(file.parts)]
    return "\n".join(f"# {file.relative_to(folder.parent)}\n{file.read_text('utf-8', 'replace')}" for file in files)


def code() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for name in CODE.split():
        folder = library / name
        yield name, sources(folder if folder.is_dir() else library / f"{name}.py")


def manual() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield "language-reference", "\n\n".join(f"{topic}\n\n{topics[topic]}" for topic in sorted(topics))
    for name in MANUAL.split():
        try:
            text = pydoc.render_doc(name, renderer=pydoc.plaintext)
            yield name, re.sub(r" at 0x[0-9a-f]+", "", text)  # addresses differ from run to run
        except ImportError:
            print(f"demo corpus: this Python has no {name}", file=sys.stderr)


def packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES.split():
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            yield name, sources(Path(found.origin).parent)


def mixed() -> Iterator[tuple[str, str]]:
    pieces = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text("utf-8", "replace")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                piece = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if 200 < len(piece) < 2_000:
                    pieces.append(piece)
    random.Random(0).shuffle(pieces)
    joined = "\n\n\n".join(pieces)
    for i in range(MIXED):
        yield f"functions-{i}", joined[i * MIXED_LENGTH : (i + 1) * MIXED_LENGTH]


def main(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = 0
    with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8", write_through=True)
        for group, made in (
            ("code", code()),
            ("manual", manual()),
            ("package", packages()),
            ("mixed", mixed()),
        ):
            for name, text in made:
                text = text[:LONGEST].replace("\0", "")
                if len(text) >= SHORTEST:
                    row = {"id": f"{group}/{name}", "text": text, "source": group, "meta": {"name": name}}
                    lines.write(json.dumps(row) + "\n")
                    documents += 1
    print(f"demo corpus: {documents} documents in {path}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
