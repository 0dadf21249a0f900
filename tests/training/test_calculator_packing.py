"""Documents become packed windows: nothing lost, nothing cut twice, no loss across documents."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from longsift.documents import ReadOptions
from longsift.errors import InputError, ModelError, TooManyBadRows, UsageError
from longsift.sources import find_sources
from longsift.training.packing import IGNORED, Cutting, PackedWindows, WindowOrder, best_fit, find_packed, pack
from longsift.windows import WindowTokenizer

START, END = 11, 12


def numbers(*, prefix: bool = False) -> WindowTokenizer:
    """A tokenizer of digits: "7" is the token 7; with `prefix`, every input begins with 11."""
    tokenizer = Tokenizer(models.WordLevel({**{str(i): i for i in range(10)}, "<s>": START, "</s>": END}, "0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if prefix:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", START)])
    return WindowTokenizer(tokenizer)


def write(path: Path, *rows: dict) -> list:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_sources([str(path)])


def packed(tmp_path: Path, *rows: dict, window: int = 8, vocab_size: int = 13, **given) -> PackedWindows:
    tokenizer = numbers(prefix=given.pop("prefix", False))
    cutting = Cutting(tokenizer, given.pop("end", END), vocab_size, window)
    sources = write(tmp_path / "docs.jsonl", *rows)
    return pack(sources, tmp_path / "data", cutting, ReadOptions(), identity={"of": "test"}, quiet=True, **given)


def pieces(windows: PackedWindows) -> list[list[int]]:
    """The tokens of every piece, without padding."""
    found = []
    for i in range(len(windows)):
        row = windows[i]
        begins = [*np.flatnonzero(row["position_ids"] == 0), windows.window]
        for begin, end in pairwise(begins):
            if (row["labels"][begin:end] != IGNORED).any():  # else it is padding
                found.append(row["input_ids"][begin:end].tolist())
    return sorted(found)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=200))
def test_best_fit_places_every_piece_once_and_overfills_no_window(lengths):
    sizes = np.array(lengths)
    order, offsets = best_fit(sizes, 40)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    filled = [int(sizes[order[a:b]].sum()) for a, b in pairwise(offsets)]
    assert offsets[-1] == len(sizes)
    assert all(0 < tokens <= 40 for tokens in filled)
    # No two windows could be one.
    assert len(filled) == 1 or sum(sorted(filled)[:2]) > 40


def test_a_long_document_gives_whole_windows_and_its_rest_is_packed_with_others(tmp_path):
    windows = packed(tmp_path, {"text": "0123456789"}, {"text": "555"})
    assert pieces(windows) == [[0, 1, 2, 3, 4, 5, 6, 7], [5, 5, 5, END], [8, 9, END]]
    assert len(windows) == 2
    assert windows.counts["tokens"] == 15


def test_positions_begin_anew_with_every_piece_and_no_loss_crosses_it(tmp_path):
    windows = packed(tmp_path, {"text": "123"}, {"text": "45"}, window=9)
    row = windows[0]
    assert row["input_ids"].tolist() == [1, 2, 3, END, 4, 5, END, END, END]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert row["labels"].tolist() == [IGNORED, 2, 3, END, IGNORED, 5, END, IGNORED, IGNORED]


def test_every_piece_begins_with_the_special_token_of_the_model(tmp_path):
    windows = packed(tmp_path, {"text": "0123456789"}, prefix=True, window=6)
    assert pieces(windows) == [[START, 0, 1, 2, 3, 4], [START, 5, 6, 7, 8, 9]]


def test_token_ids_are_taken_as_they_are(tmp_path):
    windows = packed(tmp_path, {"input_ids": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]}, prefix=True)
    assert pieces(windows) == [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3]]


@pytest.mark.parametrize(("vocab_size", "size"), [(1 << 16, 2), ((1 << 16) + 1, 4)], ids=["16 bits", "32 bits"])
def test_tokens_take_as_few_bytes_as_the_vocabulary_needs(tmp_path, vocab_size, size):
    largest = vocab_size - 1
    windows = packed(tmp_path, {"input_ids": [largest] * 8}, vocab_size=vocab_size)
    assert (tmp_path / "data" / "tokens.bin").stat().st_size == 8 * size
    assert windows[0]["input_ids"].tolist() == [largest] * 8


def test_tokens_are_counted_by_group(tmp_path):
    windows = packed(tmp_path, {"text": "123", "source": "a"}, {"text": "45", "source": "b"}, end=None)
    assert windows.counts["groups"] == {"a": 3, "b": 2}


def test_the_same_documents_are_tokenised_once(tmp_path):
    packed(tmp_path, {"text": "123"})
    before = (tmp_path / "data" / "tokens.bin").stat().st_mtime_ns
    packed(tmp_path, {"text": "123"})
    assert (tmp_path / "data" / "tokens.bin").stat().st_mtime_ns == before
    assert find_packed(tmp_path / "data", {"of": "another"}) is None


@pytest.mark.parametrize(
    ("rows", "given", "error", "message"),
    [
        ([{"text": "1"}], {"end": None}, InputError, "nothing to train on"),
        ([{"text": "123"}, {"txt": "4"}], {"max_bad": 0.4}, TooManyBadRows, "missing text key 'text'"),
        ([{"input_ids": [1, 13]}], {}, ModelError, "the token 13"),
        ([{"text": "123"}], {"window": 2, "prefix": True}, UsageError, "no room for text"),
    ],
    ids=["one token", "bad rows", "foreign ids", "no room"],
)
def test_what_cannot_be_packed_is_refused(tmp_path, rows, given, error, message):
    with pytest.raises(error, match=message):
        packed(tmp_path, *rows, **given)
    assert find_packed(tmp_path / "data", {"of": "test"}) is None


def test_every_window_comes_once_a_pass_in_an_order_of_the_seed(tmp_path):
    windows = packed(tmp_path, *({"text": "1234567"} for _ in range(9)))
    order = WindowOrder(windows, 20, seed=3)
    seen = [order.index(i) for i in range(20)]
    assert sorted(seen[:9]) == sorted(seen[9:18]) == list(range(9))
    assert seen[:9] != seen[9:18]
    assert [WindowOrder(windows, 99, seed=3).index(i) for i in (19, 0)] == [seen[19], seen[0]]
    assert [WindowOrder(windows, 20, seed=4).index(i) for i in range(9)] != seen[:9]
    assert len(list(order)) == len(order) == 20
