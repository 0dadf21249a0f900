"""Coherent windows and their controls, on made token ids whose document and place can be read off each token."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from longsift.errors import InputError, UsageError
from longsift.evaluation.controls import DEGENERATE, PAIRED, Sample, build_controls, draw_coherent, fold_of
from longsift.windows import WindowTokenizer

LENGTH, SEGMENT = 64, 8
PLACES = 10_000  # token = document · PLACES + place


def coherent(documents: int, *, length: int = LENGTH, group: str = "book", fold: int = 0, per_document: int = 1):
    return [
        Sample("coherent", group, f"{group}-{d}", fold, (d * PLACES + w * length + np.arange(length)).astype(np.int32))
        for d in range(documents)
        for w in range(per_document)
    ]


def documents_of(sample: Sample) -> np.ndarray:
    return sample.input_ids // PLACES


def all_tokens(samples) -> Counter:
    return Counter(np.concatenate([sample.input_ids for sample in samples]).tolist())


def segments(sample: Sample, size: int = SEGMENT) -> list[np.ndarray]:
    return np.split(sample.input_ids, range(size, len(sample.input_ids), size))


@pytest.fixture(scope="module")
def tokenizer() -> WindowTokenizer:
    """Every byte a token, and one special token at the start and one at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return WindowTokenizer(backend)


def write_corpus(folder: Path, rows: list[dict], parts: int = 1) -> list[str]:
    folder.mkdir(exist_ok=True)
    for part in range(parts):
        lines = [json.dumps(row) + "\n" for row in rows[part::parts]]
        (folder / f"part-{part}.jsonl").write_text("".join(lines), "utf-8")
    return [str(folder)]


def corpus_rows(groups: dict[str, int], length: int = 300) -> list[dict]:
    # Each document counts in its own letters, so that every window of it is different.
    return [
        {"id": f"{group}-{d}", "source": group, "text": "".join(f"{group[0]}{d}.{i};" for i in range(length // 6))}
        for group, count in groups.items()
        for d in range(count)
    ]


class TestMixed:
    @given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 99))
    @settings(max_examples=40, deadline=None)
    def test_exchanges_segments_and_keeps_each_position_and_every_token(self, documents, per_document, seed):
        windows = coherent(documents, per_document=per_document)
        mixed = build_controls(windows, kinds=["mixed"], segment=SEGMENT, seed=seed)
        assert len(mixed) == len(windows)
        for position in range(LENGTH):
            before = Counter(int(s.input_ids[position]) for s in windows)
            assert before == Counter(int(s.input_ids[position]) for s in mixed)
        assert all(len({*segment // PLACES}) == 1 for s in mixed for segment in segments(s))

    def test_takes_every_segment_from_another_document_where_there_are_enough(self):
        for sample in build_controls(coherent(20), kinds=["mixed"], segment=SEGMENT):
            assert len({int(s[0]) // PLACES for s in segments(sample)}) == LENGTH // SEGMENT

    def test_takes_one_window_of_each_document_where_it_has_several(self):
        for sample in build_controls(coherent(4, per_document=2), kinds=["mixed"], segment=SEGMENT):
            windows = {(int(s[0]) // PLACES, int(s[0]) % PLACES // LENGTH) for s in segments(sample)}
            assert len(windows) == len({document for document, _ in windows}) == 3

    def test_few_documents_take_turns_and_none_follows_itself(self):
        for sample in build_controls(coherent(5), kinds=["mixed"], segment=SEGMENT):
            sources = [int(segment[0]) // PLACES for segment in segments(sample)]
            assert all(len({*sources[turn : turn + 4]}) == 4 for turn in range(0, len(sources), 4))
            assert all(a != b for a, b in itertools.pairwise(sources))

    def test_is_of_the_document_that_its_first_tokens_are_from(self):
        samples = build_controls(coherent(9), kinds=PAIRED, segment=SEGMENT)
        assert all(s.doc_id == f"book-{s.input_ids[0] // PLACES}" for s in samples)
        for kind in PAIRED:
            assert len({s.doc_id for s in samples if s.kind == kind}) == 9


@pytest.mark.parametrize("kind", PAIRED)
class TestPairedKinds:
    def test_stays_within_group_and_fold(self, kind):
        windows = [
            Sample("coherent", group, f"{group}{fold}-{d}", fold, np.full(LENGTH, 100 * g + 10 * fold + d, np.int32))
            for g, group in enumerate(("book", "code"))
            for fold in (0, 1)
            for d in range(4)
        ]
        for sample in build_controls(windows, kinds=[kind], segment=SEGMENT):
            assert {*(sample.input_ids // 10)} == {10 * ("book", "code").index(sample.group) + sample.fold}

    def test_depends_on_the_seed_alone_and_not_on_the_order(self, kind):
        def made(windows, seed):
            return {s.input_ids.tobytes() for s in build_controls(windows, kinds=[kind], segment=SEGMENT, seed=seed)}

        windows = coherent(8)
        assert made(windows, 1) == made(windows[::-1], 1) != made(windows, 2)

    def test_of_one_document_cannot_be_made(self, kind):
        with pytest.raises(UsageError, match="one document in fold 0"):
            build_controls(coherent(1), kinds=[kind], segment=SEGMENT)

    def test_of_a_document_that_outweighs_the_others_cannot_be_made(self, kind):
        with pytest.raises(UsageError, match="more than half of the windows"):
            build_controls([*coherent(1, per_document=3), *coherent(3)[1:]], kinds=[kind], segment=SEGMENT)

    @pytest.mark.parametrize("counts", [(2, 1, 1), (3, 1, 2), (4, 4, 1, 1)], ids=str)
    def test_never_joins_two_windows_of_a_document_where_these_are_unequally_many(self, kind, counts):
        windows = [w for d, n in enumerate(counts) for w in coherent(d + 1, per_document=n)[-n:]]
        for sample in build_controls(windows, kinds=[kind], segment=SEGMENT):
            own = {(int(t) // PLACES, int(t) % PLACES // LENGTH) for t in sample.input_ids}
            if kind in ("mixed", "far-half"):
                assert len(own) == len({document for document, _ in own}) > 1

    def test_of_two_documents_is_no_window_of_either(self, kind):
        windows = coherent(2)
        whole = {s.input_ids.tobytes() for s in windows}
        for sample in build_controls(windows, kinds=[kind], segment=SEGMENT):
            assert sample.input_ids.tobytes() not in whole

    def test_keeps_special_tokens_at_the_ends(self, kind, tokenizer):
        windows = [
            Sample("coherent", "book", str(d), 0, np.array([0, *range(10 + 40 * d, 46 + 40 * d), 1], np.int32))
            for d in range(6)
        ]
        for sample in build_controls(windows, kinds=[kind], segment=5, tokenizer=tokenizer):
            assert (sample.input_ids[0], sample.input_ids[-1]) == (0, 1)
            assert sample.input_ids[1:-1].min() >= 10


def test_shuffled_moves_every_segment_of_the_same_document():
    windows = coherent(5)
    for sample in build_controls(windows, kinds=["shuffled"], segment=SEGMENT):
        own = next(w for w in windows if w.doc_id == sample.doc_id)
        places = [int(segment[0]) for segment in segments(sample)]
        assert sorted(places) == [int(segment[0]) for segment in segments(own)]
        assert all(place != int(segment[0]) for place, segment in zip(places, segments(own), strict=True))


def test_far_half_gives_a_window_the_first_half_of_another_document():
    windows = coherent(6, per_document=2)
    controls = build_controls(windows, kinds=["far-half"], segment=SEGMENT)
    assert all_tokens(controls) == all_tokens(windows)
    for sample in controls:
        first, second = documents_of(sample)[: LENGTH // 2], documents_of(sample)[LENGTH // 2 :]
        assert len({*first}) == len({*second}) == 1
        assert first[0] != second[0]


def test_pieces_are_short_and_change_the_document_each_time():
    for sample in build_controls(coherent(6, length=2_048), kinds=["pieces"], segment=512):
        breaks = np.flatnonzero(np.diff(sample.input_ids) != 1) + 1
        sizes = np.diff([0, *breaks, 2_048])
        assert sizes.max() <= 512
        assert sizes[:-1].min() >= 64
        assert all(a != b for a, b in zip(documents_of(sample)[breaks - 1], documents_of(sample)[breaks], strict=True))


class TestDegenerate:
    def test_every_kind_fills_the_window_exactly(self, tokenizer):
        windows = [Sample("coherent", "book", str(d), d % 2, np.full(700, 5 + d, np.int32)) for d in range(5)]
        made = build_controls(windows, kinds=["degenerate"], tokenizer=tokenizer, per_kind=3, segment=64)
        assert Counter(s.kind for s in made) == dict.fromkeys(DEGENERATE, 3)
        generated = [s for s in made if s.kind != "degenerate/shuffled-tokens"]
        for sample in generated:
            assert sample.input_ids.shape == (700,)
            assert (sample.input_ids[0], sample.input_ids[-1], sample.group) == (0, 1, "")
            assert 1 not in sample.input_ids[1:-1]
        assert {s.fold for s in generated} == {0, 1}
        assert len({s.input_ids.tobytes() for s in generated}) == len(generated)

    def test_shuffled_tokens_are_those_of_a_window(self):
        windows = coherent(6)
        for sample in build_controls(windows, kinds=["degenerate/shuffled-tokens"], segment=SEGMENT, per_kind=4):
            own = next(w for w in windows if w.doc_id == sample.doc_id)
            assert sorted(sample.input_ids) == sorted(own.input_ids)
            assert not np.array_equal(sample.input_ids, own.input_ids)

    def test_text_needs_a_tokenizer(self):
        with pytest.raises(UsageError, match="give the tokenizer"):
            build_controls(coherent(3), kinds=["degenerate/csv"], segment=SEGMENT)


@pytest.mark.parametrize(
    ("kinds", "segment", "message"),
    [(["mixd"], SEGMENT, "no control 'mixd'"), (["mixed"], 33, "does not fit twice"), (["mixed"], 0, "does not fit")],
    ids=["unknown kind", "segment too long", "no segment"],
)
def test_build_controls_refuses(kinds, segment, message):
    with pytest.raises(UsageError, match=message):
        build_controls(coherent(3), kinds=kinds, segment=segment)


class TestDraw:
    def draw(self, inputs, tokenizer, **changes):
        return draw_coherent(inputs, tokenizer, 50, **{"per_group": 5, **changes})

    def test_takes_windows_out_of_the_documents(self, tmp_path, tokenizer):
        rows = corpus_rows({"book": 8, "code": 3})
        samples = self.draw(write_corpus(tmp_path, rows), tokenizer)
        assert Counter(s.group for s in samples) == {"book": 5, "code": 3}
        texts = {row["id"]: tokenizer.encode([row["text"]])[0].ids.tobytes() for row in rows}
        for sample in samples:
            assert sample.input_ids.shape == (50,)
            assert (sample.input_ids[0], sample.input_ids[-1]) == (0, 1)
            assert sample.input_ids[1:-1].tobytes() in texts[sample.doc_id]
            assert sample.fold == fold_of(sample.doc_id, 4)

    def test_depends_on_ids_and_seed_and_not_on_files_or_order(self, tmp_path, tokenizer):
        rows = corpus_rows({"book": 30, "code": 30})
        one = self.draw(write_corpus(tmp_path / "one", rows), tokenizer)
        other = self.draw(write_corpus(tmp_path / "other", rows[::-1], parts=3), tokenizer)
        assert [s.key for s in one] == [s.key for s in other]
        assert [s.key for s in one] != [s.key for s in self.draw([str(tmp_path / "one")], tokenizer, seed=1)]

    def test_windows_of_a_document_do_not_overlap(self, tmp_path, tokenizer):
        row = {"id": "d", "text": "".join(chr(0x4E00 + i) for i in range(90))}
        texts = [s.input_ids[1:-1] for s in self.draw(write_corpus(tmp_path, [row]), tokenizer, per_document=9)]
        whole = tokenizer.encode([row["text"]])[0].ids.tobytes()
        starts = sorted(whole.index(text.tobytes()) // 4 for text in texts)
        assert len(texts) == 270 // 48
        assert all(b - a >= 48 for a, b in itertools.pairwise(starts))

    def test_short_documents_are_left_out_before_the_draw(self, tmp_path, tokenizer):
        rows = [*corpus_rows({"book": 4}), *({"id": f"s{i}", "source": "book", "text": "short"} for i in range(40))]
        assert {s.doc_id for s in self.draw(write_corpus(tmp_path, rows), tokenizer)} == {f"book-{i}" for i in range(4)}

    def test_control_groups_become_natural_controls_of_every_group(self, tmp_path, tokenizer):
        inputs = write_corpus(tmp_path, corpus_rows({"book": 3, "noise": 3, "code": 3}))
        samples = self.draw(inputs, tokenizer, control_groups=["noise"], groups=["book"], folds=1)
        assert Counter((s.kind, s.group) for s in samples) == {("coherent", "book"): 3, ("natural/noise", ""): 3}
        assert {s.kind for s in build_controls(samples, kinds=["mixed"], segment=8)} == {"mixed"}

    def test_reads_the_windows_of_a_run_folder(self, tmp_path, tokenizer):
        import pyarrow as pa
        import pyarrow.parquet as pq

        from longsift.tables import WINDOWS

        rows = [
            {"window_id": f"d{d}:{w}", "doc_id": f"d{d}", "group": "g", "index": w, "start": 50 * w, "n_tokens": 50}
            | {"input_ids": [0, *range(10, 58), 1], "text": "x", "metadata": "{}"}
            for d in range(4)
            for w in range(3)
        ]
        (tmp_path / "windows").mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=WINDOWS), tmp_path / "windows" / "00000-00000.parquet")
        samples = self.draw([str(tmp_path)], tokenizer, per_group=3)
        assert Counter(s.doc_id for s in samples).most_common(1)[0][1] == 1
        assert {s.group for s in samples} == {"g"}
        assert all(s.input_ids.tolist() == [0, *range(10, 58), 1] for s in samples)

    def test_a_corpus_of_short_documents_is_refused(self, tmp_path, tokenizer):
        with pytest.raises(InputError, match="No document has 50 tokens"):
            self.draw(write_corpus(tmp_path, [{"text": "short"}]), tokenizer)


def test_every_sample_has_a_key_of_its_own():
    windows = coherent(6, per_document=2)
    samples = [*windows, *build_controls(windows, kinds=PAIRED, segment=SEGMENT)]
    assert len({sample.key for sample in samples}) == len(samples)
    assert windows[0].key == coherent(6, per_document=2)[0].key
