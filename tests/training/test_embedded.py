"""The calculator that ships with the package, and the program that makes one."""

from __future__ import annotations

import argparse as any_module
import inspect
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import longsift.calculators
from longsift.errors import InputError, OutputError, UsageError
from longsift.training.configs import hybrid
from longsift.training.corpus import (
    END_OF_TEXT,
    Packed,
    load_packed,
    pack,
    read_texts,
    save_packed,
    save_tokenizer,
    train_tokenizer,
)
from longsift.training.embedded import CONFIG, main
from longsift.training.figures import copy_losses, cut_windows, evaluate
from longsift.training.loop import Recipe, learning_rate, train
from longsift.training.model import load_model, new_model, token_losses
from longsift.training.sampling import WindowSampler

SHIPPED = Path(longsift.calculators.__file__).parent / "embedded"
TINY = {
    **hybrid("smollm3", hidden=32, intermediate=64, layers=2, heads=2, global_layers=(1,), window=16),
    "vocab_size": 320,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
QUICK = Recipe(stages=((32, 15), (64, 5)), batch_tokens=512, micro_tokens=256, warmup=2, repeat_share=0.5)


@pytest.fixture(scope="module")
def shipped_tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)


@pytest.fixture(scope="module")
def shipped_model():
    return load_model(SHIPPED)


@pytest.fixture(scope="module")
def stories() -> list[tuple[str, str]]:
    chance = random.Random(0)
    words = "the river ran under an old stone bridge while grey geese flew home"

    def story() -> str:
        return " ".join(chance.choices(words.split(), k=600))

    return [(story(), group) for group in ("tale", "tale", "song")]


@pytest.fixture(scope="module")
def packed(stories) -> Packed:
    tokenizer = train_tokenizer((text for text, _ in stories), TINY["vocab_size"])
    return pack(stories, tokenizer)


def test_the_shipped_folder_is_under_16_million_bytes():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 16_000_000


def test_the_shipped_configuration_is_the_default_of_the_training_program():
    assert json.loads((SHIPPED / "config.json").read_text()) == CONFIG


def test_the_shipped_model_loads_in_transformers_and_gives_the_same_losses(shipped_model):
    ordinary = AutoModelForCausalLM.from_pretrained(SHIPPED, local_files_only=True, dtype=torch.float32).eval()
    ids = torch.randint(1, CONFIG["vocab_size"], (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ordinary(ids, labels=ids).loss
        assert torch.allclose(token_losses(shipped_model, ids[:, :-1], ids[:, 1:]).mean(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("def f(x):\r\n\treturn  x ** 2  # done\r\n\r\n", id="code-crlf"),
        pytest.param("naïve e\u0301 日本語 مرحبا \u2028\u0085", id="scripts-and-line-separators"),
        pytest.param("👩‍👩‍👧 🏳️‍🌈 😀", id="emoji"),
        pytest.param("\x00\x01 \ufeff\ufffd", id="controls"),
        pytest.param("  \n\n   \n\t", id="spaces-only"),
        pytest.param("1234567890 3.14159", id="digits"),
    ],
)
def test_the_tokenizer_gives_back_exactly(shipped_tokenizer, text):
    assert shipped_tokenizer.decode(shipped_tokenizer(text)["input_ids"]) == text


@given(st.text())
def test_the_tokenizer_gives_back_any_text_and_adds_no_special_token(shipped_tokenizer, text):
    ids = shipped_tokenizer(text)["input_ids"]
    assert shipped_tokenizer.decode(ids) == text
    if END_OF_TEXT not in text:
        assert shipped_tokenizer.eos_token_id not in ids


def test_the_shipped_model_beats_the_texts_own_unigrams_by_far(shipped_model, shipped_tokenizer):
    text = inspect.getsource(any_module)[:12_000]
    ids = shipped_tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = token_losses(shipped_model, ids[:, :-1], ids[:, 1:]).mean().item()
    share = np.bincount(ids[0].numpy()) / ids.numel()
    unigram = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert loss < 0.6 * unigram


def test_the_shipped_model_foretells_a_segment_it_has_seen_1024_tokens_ago(shipped_model):
    chance = np.random.default_rng(0)
    windows = chance.integers(1, CONFIG["vocab_size"], size=(2, 1536)).astype(np.uint16)
    first, second = copy_losses(shipped_model, windows, 64, 1024, seed=0, from_text=False)
    assert second < 0.5 * first


def test_training_reduces_the_loss_and_writes_a_folder_that_loads(packed, stories, tmp_path):
    losses = train(packed, TINY, QUICK, tmp_path)
    save_tokenizer(train_tokenizer((text for text, _ in stories), TINY["vocab_size"]), tmp_path, 64)
    assert len(losses) == QUICK.steps
    assert np.mean(losses[-3:]) < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ids = tokenizer("the old bridge", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], TINY["vocab_size"])


def test_a_run_stopped_and_resumed_equals_a_run_in_one_go(packed, tmp_path):
    recipe = replace(QUICK, stages=((32, 60),))
    state = tmp_path / "state.pt"
    first = train(packed, TINY, recipe, tmp_path / "parts", state=state, until=50)
    rest = train(packed, TINY, recipe, tmp_path / "parts", state=state)
    assert [len(first), len(rest)] == [50, 10]
    assert first + rest == pytest.approx(train(packed, TINY, recipe, tmp_path / "once"), rel=1e-5)
    assert train(packed, TINY, recipe, tmp_path / "parts", state=state) == []  # already finished
    with pytest.raises(OutputError, match="another run"):
        train(packed, TINY, QUICK, tmp_path / "parts", state=state)


def test_a_run_can_start_from_a_trained_folder(packed, tmp_path):
    before = train(packed, TINY, QUICK, tmp_path / "first")
    after = train(packed, TINY, QUICK, tmp_path / "second", init=tmp_path / "first")
    assert after[0] < before[0] - 0.5


def test_windows_lie_inside_one_document_and_weights_of_0_leave_a_category_out(packed):
    sampler = WindowSampler(packed, {"song": 0.0}, repeat_share=0.0, seed=0)
    positions = sampler.draw(step=3, batch=64, length=40)
    documents = np.searchsorted(packed.ends, positions, side="right")
    assert (documents == documents[:, :1]).all()
    assert {packed.groups[document] for document in documents[:, 0]} == {"tale"}
    assert (positions == sampler.draw(step=3, batch=64, length=40)).all()


def test_packed_documents_are_read_back_as_they_were_written(packed, tmp_path):
    save_packed(packed, tmp_path / "a")
    twice = load_packed([tmp_path / "a", tmp_path / "a"])
    assert np.array_equal(twice.tokens, np.concatenate([packed.tokens, packed.tokens]))
    assert twice.ends.tolist() == [*packed.ends, *(packed.ends + packed.ends[-1])]
    assert twice.groups == packed.groups * 2


def test_token_bytes_add_up_to_the_utf8_length_of_the_text():
    text = "naïve 日本語 😀 " * 3
    packed = pack([(text, "any")], train_tokenizer([text], 300))
    assert packed.token_bytes[packed.tokens].sum() == len(text.encode())


def test_evaluation_of_an_untrained_model_finds_nothing_in_far_context(packed):
    figures = evaluate(new_model(TINY, seed=0).eval(), packed, length=128, per_group=2)
    tale = figures["groups"]["tale"]
    assert tale["windows"] == 2
    assert tale["loss_last"]["full"] == pytest.approx(tale["loss_last"]["short"], abs=0.05)
    assert tale["loss_at"]["0-4"] == pytest.approx(math.log(TINY["vocab_size"]), abs=0.3)
    assert figures["copy"]["random"]["second"] == pytest.approx(figures["copy"]["random"]["first"], abs=0.1)


def test_evaluation_windows_are_disjoint_and_as_many_as_asked(packed):
    windows = cut_windows(packed, 100, per_group=3)
    assert {group: rows.shape for group, rows in windows.items()} == {"song": (3, 100), "tale": (3, 100)}


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (9, 1.0), (50, 1.0), (75, 0.5), (99, 0.02)])
def test_the_learning_rate_warms_up_stays_and_falls(step, factor):
    assert learning_rate(step, step / 100, warmup=10, decay=0.5) == pytest.approx(factor)


def test_every_command_runs_from_files(stories, tmp_path, capsys):
    documents = tmp_path / "docs.jsonl"
    documents.write_text("".join(json.dumps({"text": text, "source": group}) + "\n" for text, group in stories))
    assert main(["tokenizer", str(documents), "--out", str(tmp_path / "m"), "--vocab-size", "320"]) == 0
    assert main(["pack", str(documents), "--tokenizer", str(tmp_path / "m"), "--out", str(tmp_path / "p")]) == 0
    command = ["train", str(tmp_path / "p"), "--out", str(tmp_path / "m"), "--stage", "32:1", "--device", "cpu"]
    assert main([*command, "--batch-tokens", "64"]) == 0
    assert main(["evaluate", str(tmp_path / "m"), str(tmp_path / "p"), "--length", "64", "--windows", "1"]) == 0
    assert set(json.loads(capsys.readouterr().out)["groups"]) == {"tale", "song"}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        pytest.param(lambda p, _: list(read_texts([str(p / "no.jsonl")])), InputError, "does not exist", id="no-file"),
        pytest.param(lambda p, _: list(read_texts([str(p / "bad.jsonl")])), InputError, "row 1", id="bad-row"),
        pytest.param(lambda p, _: load_packed([p]), InputError, "make one with `pack`", id="not-packed"),
        pytest.param(lambda p, _: load_model(p), InputError, "make one with `train`", id="no-model"),
        pytest.param(
            lambda p, data: train(data, {**TINY, "vocab_size": 300}, QUICK, p), UsageError, "own tokenizer", id="vocab"
        ),
        pytest.param(
            lambda _, data: WindowSampler(data, {}, 0.0, 0).draw(0, 1, 10**6),
            InputError,
            "longer documents",
            id="short",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(call, error, says, packed, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"no": "text"}\n')
    with pytest.raises(error, match=says):
        call(tmp_path, packed)
