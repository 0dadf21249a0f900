"""Training windows: documents, copies of what stands before, and facts that are stated before they are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from longsift.errors import UsageError
from longsift.training.corpus import Packed, train_tokenizer
from longsift.training.facts import LONGEST, make_facts
from longsift.training.sampling import SLOT, WindowSampler, add_copies

TOTAL = 20_000


@pytest.fixture(scope="module")
def packed() -> Packed:
    tokens = np.arange(TOTAL, dtype=np.uint16)
    return Packed(tokens, np.array([TOTAL // 2, TOTAL]), ("a", "b"), np.ones(1 << 15, dtype=np.int64))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The address of the old house is number 1234567890, she said."], 320)


@pytest.fixture(scope="module")
def facts(tokenizer):
    return make_facts(tokenizer, 500)


def test_several_processes_draw_the_rows_of_one(packed, facts):
    sampler = WindowSampler(packed, {}, 0.5, 7, recall_share=0.5, facts=facts)
    together = sampler.draw(3, 10, 512)
    apart = [sampler.draw(3, 10, 512, slice(begin, begin + 5)) for begin in (0, 5)]
    assert np.array_equal(together, np.concatenate(apart))
    assert not np.array_equal(together, sampler.draw(4, 10, 512))


def test_rows_of_one_step_are_changed_each_in_its_own_way(packed):
    rows = WindowSampler(packed, {}, 1.0, 0).draw(0, 8, 512)
    places = [tuple(np.flatnonzero(np.diff(row) != 1)) for row in rows]
    assert len(set(places)) == len(places)


def test_copies_come_from_before_and_from_every_distance():
    distances, sizes = [], []
    for seed in range(300):
        row = np.arange(4097)
        add_copies(row, np.random.default_rng(seed))
        moved = np.flatnonzero(row != np.arange(4097))
        back = moved - row[moved]
        assert (back > 0).all()
        distances += back.tolist()
        sizes.append(len(moved))
    assert min(sizes) >= 8
    assert max(sizes) <= 8 * 256
    share = np.histogram(distances, [0, 64, 512, 2048, 4097])[0] / len(distances)
    assert share.min() > 0.01
    assert share[3] > 0.15  # more than half of the window away


def test_every_statement_stands_before_its_questions_and_whole(packed, facts):
    rows = WindowSampler(packed, {}, 0.0, 0, recall_share=1.0, facts=facts).draw(0, 20, 4096)
    place = {
        TOTAL + start: (fact, which) for fact, three in enumerate(facts.spans) for which, (start, _) in enumerate(three)
    }
    gaps = []
    for row in rows:
        stated: dict[int, int] = {}
        asked = set()
        for at, position in enumerate(row.tolist()):
            if position not in place:
                continue
            fact, which = place[position]
            size = facts.spans[fact, which, 1]
            assert np.array_equal(row[at : at + size], position + np.arange(size))
            if which == 0:
                stated[fact] = at
            else:
                gaps.append(at - stated[fact])  # a KeyError would be a question before its statement
                asked.add(fact)
        assert 5 <= len(stated) <= 16
        assert asked == set(stated)
    assert min(gaps) < 4 * SLOT
    assert max(gaps) > 3000


def test_a_question_ends_with_what_only_the_statement_tells(tokenizer, facts):
    for fact in facts.spans[::25]:
        statement, *questions = (tokenizer.decode(facts.tokens[start : start + size].tolist()) for start, size in fact)
        for question in questions:
            answer = question.strip().rstrip('."').split()[-1].strip('"')
            assert answer in statement


def test_facts_are_short_the_same_for_a_seed_and_of_several_wordings(tokenizer, facts):
    again = make_facts(tokenizer, 500)
    assert np.array_equal(again.tokens, facts.tokens)
    assert facts.spans[:, :, 1].max() <= LONGEST
    assert len(facts.kinds) >= 8
    assert facts.kinds[-1][1] == len(facts.spans)


def test_facts_need_long_windows_and_a_tokenizer(packed, facts):
    with pytest.raises(UsageError, match="too short"):
        WindowSampler(packed, {}, 0.0, 0, recall_share=0.1, facts=facts).draw(0, 1, 128)
    with pytest.raises(UsageError, match="tokenizer"):
        WindowSampler(packed, {}, 0.0, 0, recall_share=0.1)
