"""Arguments that do not fit together are refused with a message that says what does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longsift.attention import far_statistics, span_focus

Q = torch.zeros(1, 4, 10, 8)
K = torch.zeros(1, 2, 10, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: far_statistics(Q[0], K, 3), "q must be", id="q-of-three-axes"),
        pytest.param(lambda: far_statistics(Q, K[:, :, :9], 3), "agree in batch, length", id="lengths-differ"),
        pytest.param(lambda: far_statistics(Q, K[..., :7], 3), "agree in batch, length", id="dims-differ"),
        pytest.param(lambda: far_statistics(Q[:0], K[:0], 3), "none of them 0", id="empty-batch"),
        pytest.param(lambda: far_statistics(Q[:, :3], K, 3), "multiple of the key heads", id="heads-ungrouped"),
        pytest.param(lambda: far_statistics(Q, K.half(), 3), "one floating-point dtype", id="dtypes-differ"),
        pytest.param(lambda: far_statistics(Q.int(), K.int(), 3), "one floating-point dtype", id="integers"),
        pytest.param(lambda: far_statistics(Q, K.to("meta"), 3), "one device", id="devices-differ"),
        pytest.param(lambda: far_statistics(Q, K, -1), "cannot be negative", id="negative-distance"),
        pytest.param(lambda: far_statistics(Q, K, 3, skip=-1), "skip counts tokens", id="negative-skip"),
        pytest.param(
            lambda: far_statistics(Q, K, 3, sliding_window=0), "sliding_window must be at least 1", id="window-0"
        ),
        pytest.param(lambda: far_statistics(Q[:, :, :1], K[:, :, :1], 1), "at least 2 tokens", id="one-token"),
        pytest.param(lambda: far_statistics(Q, K, 3, softcap=0.0), "softcap must be positive", id="softcap-0"),
        pytest.param(
            lambda: far_statistics(Q, K, 3, backend="gpu"),  # type: ignore[arg-type]
            "backend must be one of 'auto'",
            id="unknown-backend",
        ),
        pytest.param(lambda: far_statistics(Q, K, 3, rows=torch.arange(3)), "rows must be the positions", id="rows"),
        pytest.param(
            lambda: span_focus(Q.double(), K.double(), 4, backend="triton"),
            'the backend "triton" (needs|takes) .*; take "auto" or "cpu"',
            id="not-for-kernels",
        ),
        pytest.param(lambda: span_focus(Q, K, 0), "span must be between 1 and", id="span-0"),
        pytest.param(lambda: span_focus(Q, K, 11), "window length 10; got 11", id="span-beyond-window"),
        pytest.param(lambda: span_focus(Q, K, 4, query_spans=[0, 2]), r"0..1; got \[2\]", id="span-index"),
        pytest.param(lambda: span_focus(Q, K, 4, query_spans=[-1]), r"0..1; got \[-1\]", id="negative-index"),
        pytest.param(lambda: span_focus(Q, K, 4, query_spans=[]), "at least one", id="no-span"),
        pytest.param(
            lambda: span_focus(Q, K, 4, denominator="full"),  # type: ignore[arg-type]
            "denominator must be",
            id="unknown-denominator",
        ),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
