"""Generated text: every kind is long enough, varied, and the same on every Python."""

from __future__ import annotations

import hashlib
from random import Random

import pytest

from longsift.evaluation.degenerate import KINDS

# Of kinds without floating-point mathematics, whose last digit may depend on the system.
PINNED = {
    "access-log": "23569b5b1eea",
    "base64-lines": "01c424447c59",
    "boilerplate": "d53d8a2e7529",
    "gibberish": "f240a03b53e5",
    "json-records": "19b2eb34a579",
    "random-unicode": "e4dfa93dfb4b",
    "sequences": "3cc24b88a245",
}


def test_there_are_many_kinds():
    assert len(KINDS) >= 30


@pytest.mark.parametrize("name", KINDS)
class TestKind:
    def test_gives_the_characters_asked_for_but_not_many_more(self, name):
        for size in (1, 5_000):
            assert size <= len(KINDS[name](Random(0), size)) < size + 8_000

    def test_follows_from_the_seed(self, name):
        assert KINDS[name](Random(3), 3_000) == KINDS[name](Random(3), 3_000)

    def test_varies_from_document_to_document(self, name):
        heads = [KINDS[name](Random(seed), 400)[:400] for seed in range(12)]
        assert len(set(heads)) == 12

    def test_is_plain_text_that_any_tokenizer_takes(self, name):
        text = "".join(KINDS[name](Random(seed), 1_000) for seed in range(5))
        assert "\0" not in text
        assert text.encode("utf-8").decode("utf-8") == text


@pytest.mark.parametrize("name", PINNED)
def test_is_the_same_on_every_python(name):
    assert hashlib.sha256(KINDS[name](Random(1), 2_000).encode()).hexdigest()[:12] == PINNED[name]
