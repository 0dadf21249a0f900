"""The chance that a score puts a coherent window above a control (AUC), and how sure it is.

0.5 is blind, 1 sees everything, 0 sees it the wrong way round. Windows of one document resemble each other, and a
control shares its tokens with the documents that it was made from; so intervals come from drawing documents again,
not windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longsift.errors import UsageError

Floats = npt.NDArray[np.float64]

LEVEL = 0.95  # of the intervals
_CELLS = 1 << 22  # pairs of windows that are compared at a time: 32 MiB


@dataclass(frozen=True, slots=True)
class Interval:
    """An AUC and the interval in which 95 % of the resampled ones lie.

    With AUC 0 or 1 no resampling gives another value, so the interval is a point: it then says nothing of documents
    that were not drawn.
    """

    auc: float
    low: float
    high: float

    @classmethod
    def of(cls, auc: float, resampled: npt.ArrayLike) -> Interval:
        """The interval of resampled AUCs, (n,)."""
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(np.asarray(resampled, dtype=np.float64), [tail, 1 - tail])
        return cls(float(auc), float(low), float(high))


def aucs(positive: npt.ArrayLike, negative: npt.ArrayLike) -> Floats:
    """AUC of many scores at once.

    Args:
        positive: (n, …) values that should be the larger ones.
        negative: (m, …) values, of the same scores.

    Returns:
        (…), P(positive > negative) + P(equal)/2.

    Raises:
        UsageError: no value on one side, or one that is not finite: it has no rank.

    >>> aucs([[3.0], [2.0]], [[1.0], [2.0]])
    array([0.875])
    """
    from scipy.stats import rankdata

    above, below = _checked(positive), _checked(negative)
    n, m = len(above), len(below)
    ranks = rankdata(np.concatenate([above, below]), axis=0)[:n].sum(axis=0)
    return np.asarray((ranks - n * (n + 1) / 2) / (n * m), dtype=np.float64)


def auc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """AUC of one score: `aucs` of (n,) and (m,) values."""
    return float(aucs(positive, negative))


def resampled_aucs(
    positive: npt.ArrayLike,
    negative: npt.ArrayLike,
    positive_documents: Sequence[str],
    negative_documents: Sequence[str],
    *,
    n: int = 1000,
    seed: int = 0,
) -> Floats:
    """AUCs of `n` corpora whose documents are drawn, with replacement, from those at hand.

    A document that has windows on both sides is drawn for both at once. Documents of the positive side alone, of the
    negative side alone and of both are drawn in the numbers in which they are there.

    Args:
        positive, negative: (windows, …) as in `aucs`.
        positive_documents, negative_documents: the document of every window.

    Returns:
        (n, …)
    """
    above, below = _checked(positive), _checked(negative)
    shape = above.shape[1:]
    above, below = above.reshape(len(above), -1), below.reshape(len(below), -1)
    # One axis of all documents; those of one side only have no window on the other.
    names = sorted({*positive_documents} | {*negative_documents})
    number = {name: i for i, name in enumerate(names)}
    rows = np.array([number[name] for name in positive_documents])
    columns = np.array([number[name] for name in negative_documents])
    weights = _draw_documents(
        len(names), np.isin(range(len(names)), rows), np.isin(range(len(names)), columns), n, seed
    )
    pairs = weights[:, rows].sum(axis=1) * weights[:, columns].sum(axis=1)
    result = np.empty((n, above.shape[1]))
    step = max(1, _CELLS // (len(above) * len(below)))
    for first in range(0, above.shape[1], step):
        some = slice(first, first + step)
        higher = above[:, None, some], below[None, :, some]
        wins = (higher[0] > higher[1]) + 0.5 * (higher[0] == higher[1])  # (n windows, m windows, scores)
        for score in range(wins.shape[2]):
            won = np.einsum("bi,bi->b", weights[:, rows] @ wins[:, :, score], weights[:, columns])
            result[:, first + score] = won / pairs
    return result.reshape(n, *shape)


def bootstrap_auc(
    positive: npt.ArrayLike,
    negative: npt.ArrayLike,
    positive_documents: Sequence[str],
    negative_documents: Sequence[str],
    *,
    n: int = 1000,
    seed: int = 0,
) -> Interval:
    """AUC of one score with its 95 % interval over documents; see `resampled_aucs`."""
    resampled = resampled_aucs(positive, negative, positive_documents, negative_documents, n=n, seed=seed)
    return Interval.of(auc(positive, negative), resampled)


def _draw_documents(
    count: int, on_positive: npt.NDArray[np.bool_], on_negative: npt.NDArray[np.bool_], n: int, seed: int
) -> Floats:
    """How often each document is drawn, (n, documents)."""
    chance = np.random.default_rng(seed)
    weights = np.zeros((n, count))
    for members in (on_positive & ~on_negative, on_negative & ~on_positive, on_positive & on_negative):
        if size := int(members.sum()):
            weights[:, members] = chance.multinomial(size, np.full(size, 1 / size), size=n)
    return weights


def _checked(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or len(array) == 0:
        raise UsageError("An AUC needs at least one window on each side.")
    if not np.isfinite(array).all():
        raise UsageError("An AUC needs finite scores; some are not. Leave out the windows that could not be measured.")
    return array
