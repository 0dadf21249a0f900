"""Where windows lie, that they are exact slices of their documents, and how a sample of them is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import longsift.windows
from longsift.documents import BadRow, Document
from longsift.errors import ModelError, UsageError
from longsift.tables import WINDOWS
from longsift.windows import (
    BottomK,
    Tally,
    TooShort,
    Window,
    WindowTokenizer,
    cut_windows,
    sample_key,
    window_starts,
    windows_table,
)

# --- where windows start ---


def published_rule(n: int, length: int) -> list[int]:
    """The rule of LongAttn, word by word: front and back, a middle for 2L < n ≤ 3L, and peeling beyond."""
    if n < length:
        return []
    if n == length:
        return [0]
    if n <= 2 * length:
        return [0, n - length]
    if n <= 3 * length:
        return [0, (n - length) // 2, n - length]
    inner = published_rule(n - 2 * length, length)
    return [0, *(length + start for start in inner), n - length]


sizes = st.integers(1, 500)


@given(st.integers(0, 1500), sizes)
@settings(max_examples=500)
def test_windows_follow_the_published_rule(n: int, length: int) -> None:
    assert window_starts(n, length) == published_rule(n, length)


@given(st.integers(0, 20_000), sizes)
def test_windows_are_sorted_distinct_within_the_document_and_cover_both_ends(n: int, length: int) -> None:
    starts = window_starts(n, length)
    assert starts == sorted(set(starts))
    assert all(0 <= start <= n - length for start in starts)
    if n >= length:
        assert starts[0] == 0
        assert starts[-1] == n - length


@given(sizes, st.integers(1, 10_000))
def test_beyond_three_lengths_the_front_and_back_are_peeled(length: int, more: int) -> None:
    n = 3 * length + more
    inner = window_starts(n - 2 * length, length)
    assert window_starts(n, length) == [0, *(length + start for start in inner), n - length]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (9, []),
        (10, [0]),
        (11, [0, 1]),
        (20, [0, 10]),
        (21, [0, 5, 11]),
        (30, [0, 10, 20]),
        (31, [0, 10, 11, 21]),
        (51, [0, 10, 20, 21, 31, 41]),
    ],
    ids=lambda value: f"n={value}" if isinstance(value, int) else "",
)
def test_windows_of_ten_tokens(n: int, expected: list[int]) -> None:
    assert window_starts(n, 10) == expected


# --- tokenizers ---

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    "the",
    "The",
    "window",
    "don't",
    "x=1;",
    "caf\u00e9",
    "\u6587\u5b57",
    "\U0001f600",
    "12345",
    "//",
    "...",
    "(a)",
]
GAPS = [" ", "\n", "\n\n", "\n ", " \n", "  ", "\t", "\r\n", "\n\u00a0", ""]


def made_text(seed: int, words: int) -> str:
    chance = np.random.default_rng(seed)
    pieces = zip(chance.choice(WORDS, words), chance.choice(GAPS, words, p=[0.5] + [0.5 / 9] * 9), strict=True)
    return "".join(word + gap for word, gap in pieces)


def byte_level(regex: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([made_text(seed, 300) for seed in range(8)], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as in GPT-2's tokenizer.json
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([made_text(seed, 300) for seed in range(8)], trainer)
    return tokenizer


def llama2_like() -> Tokenizer:
    """As converted from sentencepiece: a normalizer marks spaces, and nothing parts words."""
    tokenizer = metaspace()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = None
    return tokenizer


BACKENDS: dict[str, Tokenizer] = {
    "GPT-2 regex": byte_level(GPT2),
    "Llama-3 regex": byte_level(LLAMA3),
    "Metaspace": metaspace(),
    "Llama-2 normalizer": llama2_like(),
}


def fresh(name: str, special: bool = False) -> Tokenizer:
    backend = Tokenizer.from_str(BACKENDS[name].to_str())
    if special:
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return fresh(request.param)


def whole(backend: Tokenizer, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


@pytest.fixture(scope="module", autouse=True)
def short_parts() -> Iterator[None]:
    """Part texts of a few hundred characters, so that small texts show what long ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(longsift.windows, "_PART_CHARS", 300)
        patch.setattr(longsift.windows, "_CONTEXT_CHARS", 100)
        patch.setattr(longsift.windows, "_BATCH_CHARS", 2000)
        yield


def spans(tokenizer: WindowTokenizer, text: str) -> list[tuple[int, int]]:
    return list(tokenizer._spans(text))


@pytest.mark.parametrize("name", BACKENDS)
@given(
    st.lists(st.tuples(st.sampled_from(WORDS) | st.text(max_size=4), st.sampled_from(GAPS)), max_size=600).map(
        lambda pieces: "".join(word + gap for word, gap in pieces)
    ),
    st.integers(0, 1 << 32),
)
@example("", 0)
@example("a", 0)
@example("a\n" * 500, 0)
@example("1" * 700 + "\n" + "1" * 700, 0)
@settings(max_examples=40, deadline=None)
def test_a_text_in_parts_has_the_tokens_of_the_whole(name: str, start: str, seed: int) -> None:
    text = start + made_text(seed, 300)
    backend = fresh(name)
    expected = whole(backend, text)
    [encoded] = WindowTokenizer(backend).encode([text])
    assert encoded.ids.tolist() == expected
    assert encoded.offsets.shape == (len(expected), 2)
    assert encoded.offsets.tolist() == [list(pair) for pair in backend.encode(text).offsets]


@pytest.mark.parametrize("name", ["GPT-2 regex", "Llama-3 regex", "Metaspace"])
def test_a_long_text_is_parted_where_words_or_lines_begin(name: str) -> None:
    text = made_text(3, 2000)
    parts = spans(WindowTokenizer(fresh(name)), text)
    assert len(parts) > 5
    assert "".join(text[start:end] for start, end in parts) == text
    assert all(text[end - 1] == "\n" or text[end] == " " for _, end in parts[:-1])


# The GPT-2 regex takes CRLF for one token at the end of a text and for two within, so such texts stay whole.
@pytest.mark.parametrize(
    ("name", "gap"),
    [("GPT-2 regex", "\n"), ("GPT-2 regex", " "), ("Llama-3 regex", " "), ("Llama-3 regex", "\r\n")],
    ids=["GPT-2, lines only", "GPT-2, one line", "Llama-3, one line", "Llama-3, CRLF lines"],
)
def test_a_long_text_is_parted_whatever_lies_between_its_words(name: str, gap: str) -> None:
    assert len(spans(WindowTokenizer(fresh(name)), f"window{gap}" * 500)) > 5


# Texts in which neither a line nor a word begins where parts might, and which pre-tokenizers see as one word or many.
RUNS = [
    *("x", "=+", " ", "\t ", "1", "1a2", "\n", "\r\n", "ab", "aab", "the", "\u3002", "\U0001f600"),
    "".join(map(chr, range(0x4E00, 0x4E80))),
    "31415926535897932384626433832795028841971693993751",
    "{a:[1,2],b=(c)};",
]


@pytest.mark.parametrize("name", ["GPT-2 regex", "Llama-3 regex"])
@pytest.mark.parametrize("run", RUNS, ids=ascii)
def test_a_stretch_in_which_no_word_begins_is_parted_between_tokens(run: str, name: str) -> None:
    text = run * (3000 // len(run))
    tokenizer = WindowTokenizer(fresh(name))
    assert max(end - start for start, end in spans(tokenizer, text)) <= 600
    assert tokenizer.encode([text])[0].ids.tolist() == whole(fresh(name), text)


@pytest.mark.parametrize("name", BACKENDS)
@given(
    st.lists(
        st.tuples(st.sampled_from(RUNS) | st.text("0123456789 \nab", min_size=1, max_size=40), st.integers(1, 300))
    )
)
@settings(max_examples=25, deadline=None)
def test_any_stretches_have_the_tokens_of_the_whole(name: str, runs: list[tuple[str, int]]) -> None:
    text = "".join(run * (1 + times // len(run)) for run, times in runs)
    backend = fresh(name)
    [encoded] = WindowTokenizer(backend).encode([text])
    expected = backend.encode(text, add_special_tokens=False)
    assert encoded.ids.tolist() == expected.ids
    assert encoded.offsets.tolist() == [list(pair) for pair in expected.offsets]


def test_a_normalizer_is_in_the_way_only_where_it_changes_the_text() -> None:
    backend = fresh("Llama-3 regex")
    backend.normalizer = normalizers.NFC()
    tokenizer = WindowTokenizer(backend)
    for text, most in (("\u00e9\u4e00" * 1500, 600), ("e\u0301\u4e00" * 1000, 3000)):
        assert max(end - start for start, end in spans(tokenizer, text)) <= most
        assert tokenizer.encode([text])[0].ids.tolist() == whole(backend, text)
    assert len(spans(tokenizer, text)) == 1


def test_a_tokenizer_without_byte_pairs_keeps_a_stretch_whole() -> None:
    backend = Tokenizer(models.WordLevel({"=": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("=+"), "isolated")
    assert spans(WindowTokenizer(backend), "=" * 5000) == [(0, 5000)]


def test_many_texts_keep_their_order(backend: Tokenizer) -> None:
    texts = [made_text(seed, seed * 20) for seed in range(30)]
    expected = [whole(backend, text) for text in texts]
    assert [encoded.ids.tolist() for encoded in WindowTokenizer(backend).encode(texts)] == expected


def test_truncation_and_padding_of_the_backend_are_off() -> None:
    backend = fresh("GPT-2 regex")
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    texts = ["the", "the window " * 20]
    lengths = [len(whole(fresh("GPT-2 regex"), text)) for text in texts]
    assert [len(encoded.ids) for encoded in WindowTokenizer(backend).encode(texts)] == lengths


def test_special_tokens_are_those_that_the_model_adds() -> None:
    backend = fresh("GPT-2 regex", special=True)
    tokenizer = WindowTokenizer(backend)
    assert tokenizer.prefix.tolist() == [backend.token_to_id("<s>")]
    assert tokenizer.suffix.tolist() == [backend.token_to_id("</s>")]
    plain = WindowTokenizer(fresh("GPT-2 regex"))
    assert (plain.prefix.tolist(), plain.suffix.tolist()) == ([], [])


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` leaves it, with weights beside the tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    fast = PreTrainedTokenizerFast(tokenizer_object=fresh("GPT-2 regex", special=True), bos_token="<s>")
    fast.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


def test_a_tokenizer_is_loaded_from_a_folder_or_a_weights_file(model_folder: Path) -> None:
    expected = whole(fresh("GPT-2 regex"), "the window")
    for model in (model_folder, model_folder / "model.safetensors"):
        tokenizer = WindowTokenizer.load(str(model))
        assert tokenizer.encode(["the window"])[0].ids.tolist() == expected
        assert len(tokenizer.prefix) == len(tokenizer.suffix) == 1


@pytest.mark.parametrize(("given_revision", "expected"), [(None, "v1"), ("v2", "v2")], ids=["in the id", "given apart"])
def test_the_revision_of_a_hub_model_reaches_transformers(
    monkeypatch: pytest.MonkeyPatch, given_revision: str | None, expected: str
) -> None:
    from transformers import AutoTokenizer

    asked = []

    def from_pretrained(name: str, *, revision: str | None, **_: object) -> None:
        asked.append((name, revision))
        raise OSError("offline")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="org/name@v1"):
        WindowTokenizer.load("org/name@v1", revision=given_revision)
    assert asked == [("org/name", expected)]


def test_a_folder_without_a_tokenizer_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        WindowTokenizer.load(str(tmp_path))


def test_a_tokenizer_without_a_fast_backend_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, ByT5Tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: ByT5Tokenizer())
    with pytest.raises(ModelError, match=r"ByT5Tokenizer.*no fast backend"):
        WindowTokenizer.load(str(tmp_path))


# --- cutting ---


def text_document(text: str, doc_id: str = "d", **metadata: object) -> Document:
    return Document(doc_id, text, None, "web", metadata, "x.jsonl", 0)


def ids_document(ids: list[int], doc_id: str = "i", text: str | None = None) -> Document:
    return Document(doc_id, text, np.array(ids, dtype=np.int32), "web", {}, "x.jsonl", 0)


def windows_of(rows: list[Window | TooShort | BadRow]) -> list[Window]:
    assert all(isinstance(row, Window) for row in rows)
    return [row for row in rows if isinstance(row, Window)]


def test_a_window_is_a_slice_of_its_documents_tokens_between_special_tokens() -> None:
    backend = fresh("Llama-3 regex", special=True)
    tokenizer = WindowTokenizer(backend)
    text = made_text(1, 500)
    ids = tokenizer.encode([text])[0].ids
    windows = windows_of(list(cut_windows([text_document(text, year=1999)], tokenizer, 66)))
    assert [window.start for window in windows] == window_starts(len(ids), 64)
    for index, window in enumerate(windows):
        assert window.window_id == f"d:{index}"
        assert (window.doc_id, window.group, window.index) == ("d", "web", index)
        assert json.loads(window.metadata) == {"year": 1999}
        assert window.input_ids.dtype == np.int32
        assert window.input_ids.tolist() == [
            *tokenizer.prefix,
            *ids[window.start : window.start + 64],
            *tokenizer.suffix,
        ]


@pytest.mark.parametrize("length", [1, 7, 64])
def test_the_text_of_a_window_is_what_its_tokens_stand_for(backend: Tokenizer, length: int) -> None:
    text = made_text(2, 400).replace("\U0001f600", "").replace("\u6587\u5b57", "").replace("\u00e9", "e")
    windows = windows_of(list(cut_windows([text_document(text)], WindowTokenizer(backend), length)))
    for window in windows:
        assert window.text is not None
        assert window.text in text
    if backend.decoder is not None:  # byte-level tokens decode to exactly their text
        assert [window.text for window in windows] == [backend.decode(window.input_ids.tolist()) for window in windows]


def test_a_text_cut_within_a_character_keeps_the_whole_character() -> None:
    tokenizer = WindowTokenizer(byte_level_untrained())
    windows = windows_of(list(cut_windows([text_document("a\U0001f600b")], tokenizer, 3)))
    assert [window.text for window in windows] == ["a\U0001f600", "\U0001f600b"]


def byte_level_untrained() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_a_document_as_long_as_a_window_is_one_window() -> None:
    tokenizer = WindowTokenizer(byte_level_untrained())
    [window] = windows_of(list(cut_windows([text_document("abcdef")], tokenizer, 6)))
    assert (window.start, window.text) == (0, "abcdef")


def test_a_short_document_is_reported_with_its_tokens() -> None:
    tokenizer = WindowTokenizer(byte_level_untrained())
    assert list(cut_windows([text_document("abcde")], tokenizer, 6)) == [TooShort("d", "web", 5)]


@pytest.mark.parametrize("length", [None, 3, 100])
def test_token_ids_are_one_window_as_they_are(length: int | None) -> None:
    tokenizer = WindowTokenizer(fresh("GPT-2 regex", special=True)) if length else None
    [window] = windows_of(list(cut_windows([ids_document([3, 1, 2, 9], text="t")], tokenizer, length)))
    assert (window.window_id, window.start, window.text) == ("i:0", 0, "t")
    assert window.input_ids.tolist() == [3, 1, 2, 9]


@pytest.mark.parametrize("missing", ["tokenizer", "length"])
def test_text_without_tokenizer_or_length_is_a_usage_error(missing: str) -> None:
    tokenizer = None if missing == "tokenizer" else WindowTokenizer(byte_level_untrained())
    with pytest.raises(UsageError, match="--model and --window"):
        list(cut_windows([text_document("abc")], tokenizer, None if missing == "length" else 3))


def test_a_window_without_room_for_text_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="2 tokens"):
        list(cut_windows([], WindowTokenizer(fresh("GPT-2 regex", special=True)), 2))


def test_order_is_kept_over_batches_and_every_row_is_counted() -> None:
    tokenizer = WindowTokenizer(byte_level_untrained())
    rows: list[Document | BadRow] = []
    for i in range(40):
        rows.append(text_document(f"{i:02}" * (40 if i % 3 else 4), doc_id=f"t{i}"))
        rows.append(ids_document([i] * 5, doc_id=f"i{i}"))
        rows.append(BadRow("x.jsonl", i, "text is empty", ""))
    tally = Tally()
    seen = []
    for row in cut_windows(rows, tokenizer, 50):
        tally.add(row)
        seen.append(row.row if isinstance(row, BadRow) else row.doc_id)
    assert list(dict.fromkeys(seen)) == [name for i in range(40) for name in (f"t{i}", f"i{i}", i)]
    assert (tally.documents, tally.too_short, tally.too_short_tokens) == (80, 14, 14 * 8)
    assert (tally.windows, tally.tokens) == (26 * 2 + 40, 26 * 2 * 50 + 40 * 5)
    assert tally.bad_rows == {"text is empty": 40}


def test_a_text_on_which_the_tokenizer_fails_is_a_bad_row_and_the_others_are_windows() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))  # knows two words and no unknown token
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    documents = [text_document(text, doc_id=text) for text in ("a b a", "a c \u00e9", "b b b")]
    first, failed, last = cut_windows(documents, WindowTokenizer(backend), 3)
    assert isinstance(failed, BadRow)
    assert (failed.file, failed.row, failed.reason) == ("x.jsonl", 0, "tokenizer failed: Exception")
    assert "UNK" in failed.excerpt
    assert [window.input_ids.tolist() for window in windows_of([first, last])] == [[0, 1, 0], [1, 1, 1]]


def test_documents_are_read_no_further_than_a_batch_ahead() -> None:
    read = 0

    def documents() -> Iterator[Document]:
        nonlocal read
        for i in range(1000):
            read += 1
            yield text_document("x" * 100, doc_id=str(i))

    rows = cut_windows(documents(), WindowTokenizer(byte_level_untrained()), 10)
    next(rows)
    assert read == 20  # 2,000 characters


def test_windows_make_a_table_with_the_shared_schema() -> None:
    tokenizer = WindowTokenizer(byte_level_untrained())
    documents = [text_document("abcdefgh", doc_id="\u00e9"), ids_document([7] * 20)]
    windows = windows_of(list(cut_windows(documents, tokenizer, 3)))
    table = windows_table(windows)
    assert table.schema == WINDOWS
    table.validate(full=True)
    assert table["input_ids"].to_pylist() == [window.input_ids.tolist() for window in windows]
    assert table["n_tokens"].to_pylist() == [3, 3, 3, 20]
    assert table["text"].to_pylist() == ["abc", "cde", "fgh", None]
    assert table["window_id"].to_pylist() == ["\u00e9:0", "\u00e9:1", "\u00e9:2", "i:0"]
    assert windows_table([]).schema == WINDOWS


# --- sampling ---


def test_sample_keys_are_uniform_and_depend_on_id_and_seed_only() -> None:
    keys = [sample_key(f"doc-{i}:0", seed=7) for i in range(20_000)]
    assert keys[0] == sample_key("doc-0:0", 7) != sample_key("doc-0:0", -8)
    assert len(set(keys)) == len(keys)
    counts, _ = np.histogram(np.array(keys, dtype=np.float64) / 2**64, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 5 * 1000**0.5  # five standard deviations


@given(st.lists(st.integers(0, 50) | st.integers(0, 2**64 - 1)), st.integers(0, 20))
def test_the_kept_keys_are_the_smallest(keys: list[int], n: int) -> None:
    bottom = BottomK(n)
    taken = [key for key in keys if bottom.offer(key)]
    smallest = sorted(keys)[:n]
    assert bottom.threshold == (smallest[-1] if smallest else None)
    assert sorted(taken)[:n] == smallest


@given(st.permutations([sample_key(f"d:{i}", 0) for i in range(40)]), st.integers(0, 45))
def test_a_sample_is_the_same_in_any_order(keys: list[int], n: int) -> None:
    bottom = BottomK(n)
    for key in keys:
        bottom.offer(key)
    kept = {key for key in keys if bottom.threshold is not None and key <= bottom.threshold}
    assert kept == set(sorted(keys)[:n])
