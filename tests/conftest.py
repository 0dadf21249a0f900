"""A small model with a tokenizer, and documents for it, made from text that every Python carries."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from browser import _chromium as _chromium
from browser import browser as browser
from checkpoints import make_checkpoint

VOCABULARY = 512


def library_text(name: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / name).read_text("utf-8")


@pytest.fixture(autouse=True)
def _a_gpu_that_is_lost_ends_the_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an illegal access every later call on the GPU fails: tell the test that made it from those."""
    yield
    if request.node.get_closest_marker("gpu") is not None:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{request.node.nodeid} left the GPU unusable: {error}", returncode=1)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A random-weight Llama with a byte-level tokenizer of its own."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", vocab_size=VOCABULARY)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([library_text("argparse.py"), library_text("typing.py")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Twelve documents in two groups, in two files; one document is too short for 512 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    text = library_text("argparse.py") + library_text("inspect.py")
    shuffled = text.splitlines(keepends=True)
    random.Random(0).shuffle(shuffled)
    rows = []
    for i in range(6):
        part = slice(i * 9_000, (i + 1) * 9_000)
        rows.append({"id": f"code-{i}", "text": text[part], "source": "code", "stars": i})
        rows.append({"id": f"mixed-{i}", "text": "".join(shuffled)[part], "source": "mixed", "stars": None})
    rows[-1]["text"] = "too short"
    for name, some in (("a.jsonl", rows[:5]), ("b.jsonl", rows[5:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    return folder
