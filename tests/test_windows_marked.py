"""Tokenizers as of sentencepiece, which mark the start of every text, have the tokens of the whole in parts too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from conftest import library_text
from longsift.documents import Document
from longsift.windows import Encoded, Window, WindowTokenizer, cut_windows
from test_windows import GAPS, RUNS, WORDS, made_text
from test_windows import short_parts as short_parts

MARK = "\u2581"
SPACES_MARKED = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
SPECIAL = ["<unk>", "<s>", "</s>"]


def trained(across_spaces: bool, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if across_spaces:
        tokenizer.normalizer = SPACES_MARKED
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([library_text("typing.py")[:40_000], *(made_text(i, 300) for i in range(8))], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


# Pairs are merged across spaces ("▁of▁the") where nothing parted words in training.
VOCABULARIES = {
    (across, size): trained(across, size) for across, size in [(False, 300), (False, 2000), (True, 300), (True, 2000)]
}


def sentencepiece(
    splitter: pre_tokenizers.Metaspace | None = None, across: bool = False, size: int = 2000, with_bytes: bool = True
) -> Tokenizer:
    """As converted from sentencepiece: spaces and the start are marked, by `splitter` or else by a normalizer."""
    vocabulary, merges = VOCABULARIES[across, size]
    if with_bytes:
        vocabulary = vocabulary | {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=with_bytes, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if with_bytes:
        tokenizer.add_special_tokens([*SPECIAL, AddedToken("<r>", rstrip=True), AddedToken("<l>", lstrip=True)])
        tokenizer.add_tokens([AddedToken("alone", single_word=True), AddedToken("two words", normalized=True)])
    if splitter is None:
        tokenizer.normalizer = SPACES_MARKED
    else:
        tokenizer.pre_tokenizer = splitter
    return tokenizer


BACKENDS = {
    "normalizer": sentencepiece(),
    "normalizer, few merges": sentencepiece(size=300),
    "normalizer, across spaces": sentencepiece(across=True),
    "normalizer, across spaces, few merges": sentencepiece(across=True, size=300),
    **{
        f"Metaspace {scheme}{', split' * split}": sentencepiece(
            pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split), across=not split
        )
        for scheme in ("first", "always", "never")
        for split in (False, True)
    },
}
WITHOUT_BYTES = {
    "normalizer, no bytes": sentencepiece(with_bytes=False),
    "Metaspace, no bytes": sentencepiece(pre_tokenizers.Metaspace(), with_bytes=False),
}
PIECES = [*WORDS, *RUNS, MARK, "</s>", "<s", "<r>", "<l>", "alone", "two words", "\ue000", "\u4e16", "e\u0301"]


class Watched(WindowTokenizer):
    longest = 0

    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        self.longest = max(self.longest, *map(len, texts))
        return super()._encode(texts)


def assert_tokens_of_the_whole(tokenizer: WindowTokenizer, backend: Tokenizer, text: str) -> None:
    [encoded] = tokenizer.encode([text])
    expected = backend.encode(text, add_special_tokens=False)
    assert encoded.ids.tolist() == expected.ids
    assert encoded.offsets.tolist() == [list(pair) for pair in expected.offsets]


@pytest.mark.parametrize("name", [*BACKENDS, *WITHOUT_BYTES])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PIECES) | st.text(max_size=4),
            st.sampled_from(GAPS),
            st.sampled_from([1, 1, 1, 2, 9, 200]),
            st.integers(0, 1 << 16),
        ),
        max_size=12,
    )
)
@example([])
@example([(" ", "", 1000, 0)])
@example([("\u4e16", "", 1000, 0), ("the", " ", 100, 0)])
@example([("a", " " * 500, 3, 0), ("<l>", "", 1, 0), ("<r>", " " * 500, 3, 0)])
@settings(max_examples=40, deadline=None)
def test_a_text_in_parts_has_the_tokens_of_the_whole(name: str, pieces: list[tuple[str, str, int, int]]) -> None:
    backend = (BACKENDS | WITHOUT_BYTES)[name]
    text = "".join((piece + gap) * times + made_text(seed, 40) for piece, gap, times, seed in pieces)
    assert_tokens_of_the_whole(WindowTokenizer(backend), backend, text)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "text",
    [
        library_text("ast.py")[:6000],
        made_text(3, 2000),
        "".join(map(chr, range(0x4E00, 0x5600))),
        "=" * 3000,
        " " * 3000,
        "zqj</s>" * 500,
    ],
    ids=["English", "made", "Chinese", "one sign", "spaces", "special tokens"],
)
def test_a_long_text_is_parted(name: str, text: str) -> None:
    tokenizer = Watched(BACKENDS[name])
    assert_tokens_of_the_whole(tokenizer, BACKENDS[name], text)
    assert tokenizer.longest < 1000


@pytest.mark.parametrize("name", [*BACKENDS, *WITHOUT_BYTES])
@pytest.mark.parametrize(
    "around",
    [
        "</s>",
        " <l> ",
        " <r> ",
        " alone ",
        " two words ",
        " " * 400 + "<l>",
        "<r>" + " " * 400,
        "\u4e16" * 600,
        "\ue000" * 9,
    ],
    ids=["special", "left", "right", "word", "words", "spaces before", "spaces after", "unknown", "private use"],
)
def test_a_text_has_the_tokens_of_the_whole_whatever_lies_where_it_is_cut(name: str, around: str) -> None:
    backend = (BACKENDS | WITHOUT_BYTES)[name]
    for shift, rest in product(range(-8, len(around[:12]) + 8), ["", "window" * 100]):
        text = ("window" * 60)[: 300 - shift] + around + rest
        assert_tokens_of_the_whole(WindowTokenizer(backend), backend, text)


def test_an_added_token_longer_than_what_is_looked_at_is_not_cut() -> None:
    backend = sentencepiece()
    backend.add_special_tokens(["=~" * 100])
    text = "window" * 30 + "=~" * 100 + "window" * 100
    assert_tokens_of_the_whole(WindowTokenizer(backend), backend, text)


def test_a_text_of_which_no_cut_can_be_proved_stays_whole() -> None:
    signs = [chr(0x4E00 + i) for i in range(701)]
    pairs = [*pairwise(signs)][::-1]  # the last are merged first: where signs end tells how they are paired
    vocabulary = {token: i for i, token in enumerate(["<unk>", *signs, *map("".join, pairs)])}
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>"))
    text = "".join(signs) * 4
    tokenizer = Watched(backend)
    assert len([*tokenizer._spans(text)]) > 5
    assert_tokens_of_the_whole(tokenizer, backend, text)
    assert tokenizer.longest == len(text)


@pytest.mark.parametrize(("split", "parted"), [(True, True), (False, False)], ids=["words", "whole text"])
def test_a_text_is_parted_by_a_unigram_model_only_where_it_sees_words(split: bool, parted: bool) -> None:
    scores = [("<unk>", -9.0), (MARK, -3.1), (MARK * 8, -5.3), (MARK * 12, -5.7), ("window", -4.9), ("ed", -6.1)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    text = ("windowed window " * 20 + " " * 50) * 10
    tokenizer = WindowTokenizer(backend)
    assert (len([*tokenizer._spans(text)]) > 5) is parted
    assert_tokens_of_the_whole(tokenizer, backend, text)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"ignore_merges": True}},
        {"model": {"unk_token": None}},
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    ],
    ids=lambda change: " ".join(f"{key} {value}" for part in change.values() for key, value in part.items()),
)
def test_no_cut_is_proved_where_more_than_merges_makes_tokens(change: dict[str, dict[str, object]]) -> None:
    rules = json.loads(BACKENDS["normalizer"].to_str())
    assert WindowTokenizer(Tokenizer.from_str(json.dumps(rules)))._only_merges
    for part, values in change.items():
        rules[part] = values if "type" in values else rules[part] | values
    assert not WindowTokenizer(Tokenizer.from_str(json.dumps(rules)))._only_merges


def test_windows_are_exact_slices_of_their_document() -> None:
    text = made_text(5, 2000)
    backend = BACKENDS["normalizer, across spaces"]
    expected = backend.encode(text, add_special_tokens=False)
    document = Document("d", text, None, "web", {}, "x.jsonl", 0)
    windows = [*cut_windows([document], WindowTokenizer(backend), 64)]
    assert len(windows) > 10
    for window in windows:
        assert isinstance(window, Window)
        end = window.start + 64
        assert window.input_ids.tolist() == expected.ids[window.start : end]
        assert window.text == text[expected.offsets[window.start][0] : expected.offsets[end - 1][1]]


def test_the_llama_tokenizer_of_transformers_parts_texts(tmp_path: Path) -> None:
    BACKENDS["Metaspace first"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}', "utf-8")
    tokenizer = WindowTokenizer.load(str(tmp_path))
    text = made_text(3, 2000)
    assert len([*tokenizer._spans(text)]) > 5
    assert_tokens_of_the_whole(tokenizer, tokenizer._backend, text)
