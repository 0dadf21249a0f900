"""Reading in chunks with a cache gives what one plain forward gives; needles are where they are said to be."""

from __future__ import annotations

import itertools
import math
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import make_checkpoint
from longsift.errors import ModelError, UsageError
from longsift.evaluation import language_model
from longsift.evaluation.language_model import LanguageModel
from longsift.evaluation.needle import make_needle, needle_test
from longsift.evaluation.perplexity import buckets, perplexity
from longsift.options import ControlOptions, MeterOptions, ModelOptions, NeedleOptions
from longsift.pieces import load_tokenizer

CPU = MeterOptions(device="cpu")
# Full attention; sliding windows of 48 in all layers, beside full ones, and with a soft cap; layers without positions.
FAMILIES = ("llama", "mistral-sliding", "gemma3", "gemma2", "smollm3")


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return LanguageModel(ModelOptions(model=str(folder)), CPU), plain


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(language_model, "CHUNK", 64)


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 160, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("small_chunks")
class TestLanguageModel:
    @pytest.mark.parametrize("length", [2, 64, 65, 200])
    def test_losses_are_those_of_a_plain_forward(self, both, length):
        model, plain = both
        ids = some_ids(length)
        with torch.no_grad():
            logits = plain(ids[None]).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        torch.testing.assert_close(model.losses(ids), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("length", "size"), [(200, 3), (129, 1), (64, 2)])
    def test_continuations_are_as_likely_as_in_plain_forwards_one_by_one(self, both, length, size):
        model, plain = both
        context, candidates = some_ids(length), some_ids(13, size)
        likelihood, greedy = model.continuations(context, candidates)
        for i, candidate in enumerate(candidates):
            with torch.no_grad():
                logits = plain(torch.cat([context, candidate])[None]).logits[0, length - 1 : -1].log_softmax(-1)
            assert float(likelihood[i]) == pytest.approx(float(logits.gather(1, candidate[:, None]).sum()), rel=1e-4)
            assert bool(greedy[i]) == bool((logits.argmax(-1) == candidate).all())

    def test_greedy_decoding_is_recognised(self, both):
        model, plain = both
        context = some_ids(90)
        written = plain.generate(context[None], max_new_tokens=3, do_sample=False)[0, 90:]
        candidates = torch.stack([written, written + torch.tensor([0, 0, 1]), (written + 1) % 160]) % 160
        assert model.continuations(context, candidates)[1].tolist() == [True, False, False]

    def test_a_foreign_id_is_refused(self, both):
        with pytest.raises(ModelError, match="outside the model's vocabulary"):
            both[0].losses(torch.tensor([1, 10**6]))


def test_a_checkpoint_without_an_output_layer_is_refused(tmp_path):
    from transformers import AutoModel

    folder = make_checkpoint(tmp_path / "whole", "llama")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "headless")
    with pytest.raises(ModelError, match="output layer"):
        LanguageModel(ModelOptions(model=str(tmp_path / "headless")), CPU)


class TestNeedle:
    @pytest.fixture(scope="class")
    def tokenizer(self, model):
        return load_tokenizer(str(model), None, False)

    @pytest.fixture(scope="class")
    def backend(self, model):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model)

    def filler(self, tokenizer, length: int) -> np.ndarray:
        return tokenizer.encode(["lorem ipsum " * length])[0].ids[:length]

    @pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
    def test_one_key_lies_at_its_depth_and_the_answer_ends_the_text(self, tokenizer, backend, depth):
        needle = make_needle(self.filler(tokenizer, 600), tokenizer, 600, depth, candidates=20, chance=Random(1))
        assert len(needle.context) + needle.candidates.shape[1] == 600
        text = backend.decode(needle.context)
        key = backend.decode(needle.candidates[0]).strip()
        assert text.endswith("\nWhat is the pass key? The pass key is")
        assert text.count(f"The pass key is {key}. Remember it.") == 1
        assert text.index("The pass key") / text.index("\nWhat") == pytest.approx(depth, abs=0.15)

    def test_candidates_are_different_and_only_the_true_key_is_in_the_text(self, tokenizer, backend):
        needle = make_needle(self.filler(tokenizer, 600), tokenizer, 600, 0.3, candidates=40, chance=Random(1))
        keys = [backend.decode(candidate).strip() for candidate in needle.candidates]
        assert len({*keys}) == 40
        assert [key in backend.decode(needle.context) for key in keys] == [True] + [False] * 39

    def test_of_several_keys_the_named_one_is_asked_and_the_others_are_candidates(self, tokenizer, backend):
        needle = make_needle(self.filler(tokenizer, 900), tokenizer, 900, 0.3, names=4, candidates=10, chance=Random(2))
        text = backend.decode(needle.context)
        keys = [backend.decode(candidate).strip() for candidate in needle.candidates]
        name = text.rpartition("The pass key of ")[2].removesuffix(" is")
        assert f"The pass key of {name} is {keys[0]}. Remember it." in text
        assert [key in text for key in keys] == [True] * 4 + [False] * 6
        assert len(needle.context) + needle.candidates.shape[1] == 900

    def test_a_text_without_room_is_refused(self, tokenizer):
        with pytest.raises(UsageError, match="needs a text"):
            make_needle(self.filler(tokenizer, 60), tokenizer, 60, 0.5, candidates=5, chance=Random(0))

    def test_a_model_that_knows_nothing_is_at_chance(self, model, corpus):
        result = needle_test(
            [str(corpus)],
            ModelOptions(model=str(model)),
            ControlOptions(),
            CPU,
            NeedleOptions(lengths="450", depths="0,1", trials=3, keys=2, candidates=8),
            quiet=True,
        )
        assert [(r["task"], r["depth"], r["trials"]) for r in result["needle"]] == [
            ("one key", "0", 3),
            ("one key", "1", 3),
            ("one key", "all", 6),
            ("2 keys", "0", 3),
            ("2 keys", "1", 3),
            ("2 keys", "all", 6),
        ]
        for row in result["needle"]:
            assert row["low"] <= row["first"] <= row["high"]
            assert 1 <= row["rank"] <= 8
        assert sum(row["exact"] for row in result["needle"]) == 0

    def test_a_model_that_always_writes_the_same_gives_the_last_rank(self, tokenizer):
        from longsift.evaluation.needle import _ask

        class Same:
            def continuations(self, context, candidates):
                return torch.zeros(len(candidates)), torch.zeros(len(candidates), dtype=torch.bool)

        needle = make_needle(self.filler(tokenizer, 600), tokenizer, 600, 0.5, candidates=9, chance=Random(0))
        assert _ask(Same(), needle) == (False, 9)


class TestPerplexity:
    @pytest.mark.parametrize(
        ("length", "edges"),
        [(100, [1, 100]), (256, [1, 256]), (1000, [1, 256, 512, 1000]), (1024, [1, 256, 512, 1024])],
        ids=str,
    )
    def test_buckets_cover_every_position_once(self, length, edges):
        assert buckets(length) == list(itertools.pairwise(edges))

    def test_is_the_mean_of_the_losses_of_drawn_windows(self, model, corpus):
        control = ControlOptions(window=400)
        result = perplexity([str(corpus)], ModelOptions(model=str(model)), control, CPU, quiet=True)["perplexity"]
        places = [(row["group"], row["from"], row["to"], row["windows"]) for row in result]
        assert places == [
            (g, a, b, n) for g, n in (("code", 6), ("mixed", 5), ("all", 11)) for a, b in ((1, 256), (256, 400))
        ]
        weighed = (6 * result[0]["loss"] + 5 * result[2]["loss"]) / 11
        assert result[4]["loss"] == pytest.approx(weighed, abs=1e-3)
        assert result[0]["perplexity"] == pytest.approx(math.exp(result[0]["loss"]), rel=1e-3)
        assert all(row["error"] > 0 for row in result)
