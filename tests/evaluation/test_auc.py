"""AUC and its intervals, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longsift.errors import UsageError
from longsift.evaluation.auc import Interval, auc, aucs, bootstrap_auc, resampled_aucs

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


def counted(positive, negative) -> float:
    wins = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    return sum(wins) / len(wins)


@given(SCORES, SCORES)
@settings(deadline=None)  # the first call imports scipy
def test_auc_is_the_share_of_pairs_in_order_ties_half(positive, negative):
    assert auc(positive, negative) == pytest.approx(counted(positive, negative))


@given(SCORES, SCORES)
@settings(deadline=None)  # the first call imports scipy
def test_the_other_way_round_is_the_rest(positive, negative):
    assert auc(positive, negative) == pytest.approx(1 - auc(negative, positive))


def test_many_scores_at_once_are_each_alone():
    chance = np.random.default_rng(0)
    positive, negative = chance.normal(size=(7, 3, 2)), chance.normal(size=(5, 3, 2))
    many = aucs(positive, negative)
    assert many.shape == (3, 2)
    for index in np.ndindex(3, 2):
        assert many[index] == pytest.approx(counted(positive[:, *index], negative[:, *index]))


@pytest.mark.parametrize(
    ("positive", "negative"), [([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([1.0], [np.inf])], ids=str
)
def test_what_has_no_rank_is_refused(positive, negative):
    with pytest.raises(UsageError):
        auc(positive, negative)


class TestResampling:
    def documents(self, n: int, each: int = 1) -> list[str]:
        return [f"d{i // each}" for i in range(n)]

    def test_a_draw_counts_pairs_by_how_often_their_documents_came(self):
        positive, negative = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
        draws = resampled_aucs(positive, negative, ["a", "b", "c"], ["x", "y"], n=200)
        wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        possible = {
            round(float((np.array(w) @ wins @ np.array(v)) / 6), 9)
            for w in np.ndindex(4, 4, 4)
            if sum(w) == 3
            for v in np.ndindex(3, 3)
            if sum(v) == 2
        }
        assert {round(float(draw), 9) for draw in draws} <= possible
        assert len({*draws.tolist()}) > 5

    def test_a_document_on_both_sides_is_drawn_for_both(self):
        # Only the pair of different documents can be out of order: a document drawn twice gives 1.
        draws = resampled_aucs([1.0, 3.0], [0.0, 2.0], ["a", "b"], ["a", "b"], n=200)
        assert {*draws.tolist()} == {0.75, 1.0}
        apart = resampled_aucs([1.0, 3.0], [0.0, 2.0], ["a", "b"], ["x", "y"], n=200)
        assert {*apart.tolist()} == {0.0, 0.5, 0.75, 1.0}

    def test_windows_of_one_document_are_no_evidence_of_their_own(self):
        chance = np.random.default_rng(1)
        positive, negative = chance.normal(0.7, 1, 12), chance.normal(0, 1, 12)

        def width(each: int) -> float:
            documents = self.documents(12 * each, each), [f"n{i // each}" for i in range(12 * each)]
            interval = bootstrap_auc(np.repeat(positive, each), np.repeat(negative, each), *documents)
            return interval.high - interval.low

        assert width(1) == pytest.approx(width(5))

    def test_covers_the_true_value_about_as_often_as_it_says(self):
        chance = np.random.default_rng(2)
        true = 0.760  # Φ(1/√2)
        hits = 0
        for seed in range(150):
            positive, negative = chance.normal(1, 1, 40), chance.normal(0, 1, 40)
            documents = self.documents(40), [f"n{i}" for i in range(40)]
            interval = bootstrap_auc(positive, negative, *documents, n=300, seed=seed)
            hits += interval.low <= true <= interval.high
        assert 0.88 <= hits / 150 <= 0.99

    def test_many_scores_share_the_draw_of_documents(self):
        chance = np.random.default_rng(3)
        positive, negative = chance.normal(size=(9, 4)), chance.normal(size=(6, 4))
        documents = self.documents(9, 2), self.documents(6)
        many = resampled_aucs(positive, negative, *documents, n=50, seed=4)
        for score in range(4):
            one = resampled_aucs(positive[:, score], negative[:, score], *documents, n=50, seed=4)
            assert np.allclose(many[:, score], one)

    def test_interval_of_resampled_values(self):
        assert Interval.of(0.5, np.linspace(0, 1, 1001)) == Interval(0.5, pytest.approx(0.025), pytest.approx(0.975))
