"""A rule of who sees whom is taken for causal or sliding only if it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from longsift.calculators.interface import _mask
from longsift.errors import UnsupportedModel

LENGTH = 50
Rule = Callable[[Any, Any, Any, Any], Any]


def test_the_causal_rule_needs_no_mask() -> None:
    for length in (1, 2, LENGTH, 8192):
        assert _mask(kv_length=length, mask_function=causal_mask_function) is None


@pytest.mark.parametrize("window", [1, 7, 24, 25, 26, 49])
def test_a_sliding_rule_is_known_by_its_width(window: int) -> None:
    width = _mask(kv_length=LENGTH, mask_function=sliding_window_causal_mask_function(window))
    assert width is not None
    assert width.tolist() == [window]


@pytest.mark.parametrize("window", [50, 51, 5000])
def test_a_window_that_holds_everything_needs_no_mask(window: int) -> None:
    assert _mask(kv_length=LENGTH, mask_function=sliding_window_causal_mask_function(window)) is None


def everything(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key >= 0


def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) | (key < 30)


def chunked(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & (key // 20 == query // 20)


def sink_and_window(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & ((key > query - 8) | (key < 2))


def never_oneself(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key < query


@pytest.mark.parametrize("rule", [everything, prefix, chunked, sink_and_window, never_oneself])
@pytest.mark.parametrize("time", ["first", "second"])
def test_any_other_rule_is_refused_every_time(rule: Rule, time: str) -> None:
    with pytest.raises(UnsupportedModel, match="masks more than the future"):
        _mask(kv_length=LENGTH, mask_function=rule)


def test_a_rule_under_vmap_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="masks more than the future"):
        _mask(kv_length=LENGTH, mask_function=causal_mask_function, use_vmap=True)


class Changing:
    """Rules that hold values: what they said once says nothing of the next time."""

    window = 9

    def method(self, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key > query - self.window)

    def closure(self) -> Rule:
        return lambda batch, head, query, key: self.method(batch, head, query, key)

    def partial(self) -> Rule:
        return functools.partial(Changing.method, self)


@pytest.mark.parametrize("kind", ["method", "closure", "partial"])
def test_a_rule_that_can_change_is_tried_every_time(kind: str) -> None:
    owner = Changing()
    rule = owner.method if kind == "method" else getattr(owner, kind)()
    for window in (9, 4):
        owner.window = window
        width = _mask(kv_length=LENGTH, mask_function=rule)
        assert width is not None
        assert width.tolist() == [window]


def test_a_rule_that_cannot_change_is_tried_once_a_length() -> None:
    asked = []

    # Its list is a default, not a closure, so that this is a plain function, as the library's causal rule is.
    def counting(batch: Any, head: Any, query: Any, key: Any, asked: list[int] = asked) -> Any:
        asked.append(key.numel())
        return key <= query

    for length in (LENGTH, LENGTH, 60, LENGTH):
        assert _mask(kv_length=length, mask_function=counting) is None
    assert asked == [LENGTH, 60]
