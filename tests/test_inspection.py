"""One document under the lens: the numbers are the specification's, and any source of a window gives a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from checkpoints import make_checkpoint
from conftest import library_text
from longsift.attention import span_focus
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.cli import app
from longsift.documents import Document
from longsift.errors import ModelError, UsageError
from longsift.inspection import (
    DependencyMap,
    Inspection,
    Inspector,
    Subject,
    inspection_page,
    maps,
    page,
    window_of_run,
)
from longsift.inspection.inspector import default_span
from longsift.inspection.maps import LEVELS, SMALLEST, dependency_map, pooled, quantise
from longsift.inspection.subjects import passages, read_subject
from longsift.methods.ladm import Ladm
from longsift.methods.longattn import LongAttn
from longsift.options import InspectOptions, ModelOptions
from longsift.pieces import load_tokenizer
from longsift.windows import cut_windows
from test_pipeline import as_json, longsift


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> FullModel:
    """Three layers of four heads that share two key heads, in float64."""
    folder = make_checkpoint(tmp_path_factory.mktemp("exact") / "llama", "llama")
    return FullModel.load(str(folder), dtype=torch.float64)


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(160, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("denominator", ["causal", "prior"])
@pytest.mark.parametrize(("length", "span"), [(331, 16), (97, 48), (256, 32)])
def test_the_map_is_the_mass_between_spans_of_the_specification(exact, length, span, denominator):
    ids = ids_of(length)
    found = dependency_map(exact, ids, span=span, denominator=denominator, heads=[1])
    expected = exact.reduce(
        ids[None],
        lambda layer: span_focus(
            layer.q, layer.k, span, scale=layer.scale, denominator=denominator, backend="reference"
        ),
    )
    assert found.shares.shape == (3, length // span, length // span)
    for layer in range(3):
        pfs = expected[layer][0].numpy() / span
        np.testing.assert_allclose(found.shares[layer], pfs.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.heads[1], expected[1][0].numpy() / span, rtol=1e-6, atol=1e-9)
    assert list(found.heads) == [1]
    assert not np.triu(found.shares, 1).any()


def test_shares_of_all_attention_add_up_to_it(exact):
    found = dependency_map(exact, ids_of(320), span=32)
    np.testing.assert_allclose(found.shares.sum(-1), 1, rtol=1e-6)
    assert found.starts().tolist() == list(range(0, 320, 32))


def test_spans_end_with_the_window(exact):
    assert dependency_map(exact, ids_of(100), span=32).starts().tolist() == [4, 36, 68]


def test_the_mean_of_the_far_curve_is_longattns_strength(exact, tmp_path):
    folder = make_checkpoint(tmp_path / "llama", "llama")
    first = FirstLayer.load(str(folder), dtype=torch.float64)
    for length in (1023, 77):
        ids = ids_of(length)
        curve = dependency_map(exact, ids, span=16, layers=[2], curve=True).curve
        strength = LongAttn().measure(first, ids[None])["dependency_strength"].item()
        counts = np.diff([*(np.arange(len(curve.mass)) * length // len(curve.mass)), length])
        assert len(curve.mass) == min(length, maps.POINTS)
        assert curve.strength == pytest.approx(strength, rel=1e-6)
        assert np.average(curve.mass, weights=counts) == pytest.approx(strength, rel=1e-6)
        assert np.average(curve.positions, weights=counts) == pytest.approx((length - 1) / 2)
        assert not curve.mass[curve.positions < curve.distance - 2].any()


def test_a_first_layer_alone_has_the_map_of_that_layer(exact, tmp_path):
    first = FirstLayer.load(str(make_checkpoint(tmp_path / "llama", "llama")), dtype=torch.float64)
    ids = ids_of(200)
    alone, whole = dependency_map(first, ids, span=16, curve=True), dependency_map(exact, ids, span=16, curve=True)
    np.testing.assert_allclose(alone.shares[0], whole.shares[0], rtol=1e-6)
    np.testing.assert_allclose(alone.curve.mass, whole.curve.mass, rtol=1e-6)
    with pytest.raises(ModelError, match="only layer 0"):
        dependency_map(first, ids, layers=[1], span=16)


def test_a_first_layer_that_slides_has_no_far_curve(tmp_path):
    gemma = FullModel.load(str(make_checkpoint(tmp_path / "gemma", "gemma3")))
    found = dependency_map(gemma, ids_of(300), span=16, curve=True)
    assert found.curve is None
    assert 0 not in found.layers


def test_a_first_layer_that_slides_has_no_map(tmp_path):
    gemma = FirstLayer.load(str(make_checkpoint(tmp_path / "gemma", "gemma3")))
    with pytest.raises(ModelError, match="Layer 0 sees only the last 48 of 300 tokens"):
        dependency_map(gemma, ids_of(300), span=16)


def test_a_span_that_does_not_fit_names_one_that_does(exact):
    with pytest.raises(UsageError, match="--span 12 or less"):
        dependency_map(exact, ids_of(200), span=128)


def test_a_coarse_map_is_that_of_longer_spans(exact):
    ids = ids_of(384)
    fine, longer = dependency_map(exact, ids, span=16), dependency_map(exact, ids, span=64)
    np.testing.assert_allclose(pooled(fine.mean(), 4), longer.mean(), rtol=1e-5)
    assert pooled(fine.mean(), 5).sum(-1) == pytest.approx(np.ones(5), rel=1e-5)
    np.testing.assert_array_equal(pooled(fine.mean(), 1), fine.mean())


def test_a_byte_keeps_a_share_to_two_percent():
    shares = np.array([0, 0.9e-5, 1e-5, 0.0123, 0.5, 1], dtype=np.float32)
    levels = quantise(shares)
    assert levels.tolist() == [0, 0, 1, levels[3], levels[4], 255]
    back = SMALLEST ** (1 - (levels[2:].astype(float) - 1) / (LEVELS - 1))
    np.testing.assert_allclose(back, shares[2:], rtol=0.023)


# --- where a window comes from ---


@pytest.fixture(scope="module")
def inspector(model) -> Inspector:
    return Inspector(ModelOptions(model=str(model)), InspectOptions(window=512, span=32))


@pytest.fixture(scope="module")
def finished(corpus, model, tmp_path_factory) -> Path:
    """A run of ladm with a span and a denominator of its own."""
    out = tmp_path_factory.mktemp("run") / "out"
    method = ["--method", "ladm", "--span", 16, "--d-afs", 2, "--d-cds", 2, "--layers", "1-2"]
    longsift("score", corpus, "-o", out, "--model", model, *method, "--window", 512, "--group-by", "source", "-q")
    return out


def first_window(run: Path) -> dict:
    return pq.read_table(next((run / "windows").glob("*.parquet"))).slice(1, 1).to_pylist()[0]


HOSTILE = '<script>alert("1")</script></textarea>&amp; שלום עולם 🙂👩‍👩‍👧 \u202e\x00 e\u0301 ' + "x" * 5_000


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE * 3, "ab" * 400], ids=["hostile", "several windows", "plain"])
@pytest.mark.parametrize("span", [7, 32])
def test_the_texts_of_the_passages_are_the_text_cut_where_tokens_begin(inspector, tmp_path, text, span):
    (tmp_path / "some.txt").write_text(text, "utf-8")
    subject = inspector.read(str(tmp_path / "some.txt"))
    assert subject.text in text
    starts = np.arange(len(subject.input_ids) % span, len(subject.input_ids), span)
    parts = passages(subject, starts, inspector.tokenizer)
    assert len(parts) == len(starts) + 1
    assert "".join(parts) == subject.text
    for start, part in zip(starts, parts[1:], strict=True):
        decoded = inspector.tokenizer.decode(subject.input_ids[start : start + span].tolist())
        assert part.strip("\ufffd") in decoded or decoded.strip("\ufffd") in part


def test_a_long_text_is_cut_as_windows_are_and_index_picks(model, tmp_path):
    text = library_text("argparse.py")
    (tmp_path / "some.py").write_text(text, "utf-8")
    document = Document("d", text, None, "all", {}, "f", 0)
    cut = list(cut_windows([document], load_tokenizer(str(model), None, False), 512))
    for index in (0, 3):
        options = InspectOptions(window=512, index=index)
        subject = Inspector(ModelOptions(model=str(model)), options).read(str(tmp_path / "some.py"))
        assert subject.input_ids.tolist() == cut[index].input_ids.tolist()
        assert subject.text == cut[index].text


@pytest.mark.parametrize(
    ("wanted", "found"), [(None, "code-0"), ("mixed-1", "mixed-1"), ("2", "code-1")], ids=["first", "id", "number"]
)
def test_a_document_of_a_file_is_picked_by_id_or_number(model, corpus, wanted, found):
    options = InspectOptions(window=512, document=wanted)
    subject = Inspector(ModelOptions(model=str(model)), options).read(str(corpus / "a.jsonl"))
    assert subject.name == found
    assert len(subject.input_ids) == 512


def test_ids_without_text_are_decoded_or_shown_as_ids(inspector, tmp_path):
    ids = inspector.tokenizer.encode([library_text("typing.py")[:3000]])[0].ids.tolist()
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n", "utf-8")
    inspection = inspector.look(inspector.read(str(tmp_path / "ids.jsonl")))
    assert inspection.decoded
    assert "".join(inspection.texts) == library_text("typing.py")[:3000]
    starts = inspection.map.starts()
    assert passages(inspection.subject, starts, None)[-1] == " ".join(map(str, ids[-32:]))
    with pytest.raises(UsageError, match="which are one window"):
        read_subject(str(tmp_path / "ids.jsonl"), None, 512, index=1)


def test_a_window_of_a_run_has_its_text_and_scores_and_is_looked_at_as_it_was_scored(finished):
    row = first_window(finished)
    inspector = Inspector.of_run(finished)
    inspection = inspector.look(window_of_run(finished, row["window_id"], inspector.tokenizer))
    assert inspection.subject.input_ids.tolist() == row["input_ids"]
    assert "".join(inspection.texts) == row["text"]
    assert not inspection.decoded
    assert inspection.map.span == 16
    assert inspection.map.denominator == "prior"
    assert inspection.map.layers == (1, 2)
    scores = pq.read_table(next((finished / "scores").glob("*.parquet"))).slice(1, 1).to_pylist()[0]
    assert inspection.subject.facts["cds"] == f"{scores['cds']:.4g}"
    assert inspection.subject.facts["Group"] == row["group"]


def test_the_cds_of_a_run_is_that_of_its_windows_maps(finished):
    row = first_window(finished)
    inspector = Inspector.of_run(finished)
    found = inspector.look(window_of_run(finished, row["window_id"], inspector.tokenizer)).map
    ladm = Ladm(span=16, d_afs=2, d_cds=2)
    rows = list(ladm.query_spans(found.length))
    layers = [
        ladm.contextual_dependency(torch.tensor(share[rows]).double() * 16, found.length) for share in found.shares
    ]
    scores = pq.read_table(next((finished / "scores").glob("*.parquet"))).slice(1, 1).to_pylist()[0]
    assert [float(layer) for layer in layers] == pytest.approx(scores["cds_layers"], rel=1e-4)


def test_a_run_of_longattn_is_looked_at_in_the_first_layer_alone(corpus, model, tmp_path):
    flags = ["--method", "longattn", "--model", model, "--window", 512, "-q"]
    longsift("score", corpus, "-o", tmp_path / "o", *flags)
    row = first_window(tmp_path / "o")
    inspector = Inspector.of_run(tmp_path / "o", options=InspectOptions(span=32))
    assert isinstance(inspector.calculator, FirstLayer)
    inspection = inspector.look(window_of_run(tmp_path / "o", row["window_id"], inspector.tokenizer))
    scores = pq.read_table(next((tmp_path / "o" / "scores").glob("*.parquet"))).slice(1, 1).to_pylist()[0]
    assert inspection.map.curve.strength == pytest.approx(scores["dependency_strength"], rel=1e-5)
    page = inspection_page(tmp_path / "o", row["window_id"], inspector)
    assert page == inspection.page()


def test_windows_of_one_id_are_told_apart_by_index(model, tmp_path):
    texts = [library_text("argparse.py")[i * 9000 : (i + 1) * 9000] for i in range(2)]
    rows = [json.dumps({"id": "same", "text": text}) + "\n" for text in texts]
    (tmp_path / "same.jsonl").write_text("".join(rows), "utf-8")
    longsift("windows", tmp_path / "same.jsonl", "-o", tmp_path / "o", "--model", model, "--window", 512, "-q")
    tokenizer = load_tokenizer(str(model), None, False)
    found = [window_of_run(tmp_path / "o", "same:0", tokenizer, index=index) for index in (0, 1)]
    assert [texts[i].startswith(subject.text) for i, subject in enumerate(found)] == [True, True]
    assert "1 of 2" in found[0].facts["Same id"]
    with pytest.raises(UsageError, match="has 2 windows 'same:0', 0 to 1"):
        window_of_run(tmp_path / "o", "same:0", tokenizer, index=2)


# --- the command ---


def test_the_command_writes_the_page_and_its_numbers(inspector, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some text.py").write_text(library_text("argparse.py")[:4000], "utf-8")
    flags = ["--model", model, "--window", 512, "--span", 32]
    found = as_json(longsift("inspect", tmp_path / "some text.py", *flags, "--json"))
    inspection = inspector.look(inspector.read(str(tmp_path / "some text.py")))
    assert found == inspection.numbers() | {"page": "some_text.py.inspect.html"}
    assert (tmp_path / found["page"]).read_text("utf-8") == inspection.page()
    mean = inspection.map.mean()
    last = found["passages"][-1]
    assert last["far_share"] == pytest.approx(mean[-1, 1 : len(mean) - inspection.far].sum(), rel=1e-5)
    shares = [source["share"] for source in last["sources"]]
    assert shares == sorted(mean[-1, 1:-1].tolist(), reverse=True)[:5]
    assert [mean[-1, source["passage"]] for source in last["sources"]] == pytest.approx(shares)
    assert "passage" in longsift("inspect", tmp_path / "some text.py", *flags, "-o", tmp_path / "other.html")
    assert (tmp_path / "other.html").exists()


def test_text_may_come_from_standard_input(model, tmp_path):
    text = library_text("argparse.py")[:4000]
    arguments = ["inspect", "-", "--model", model, "--span", 32, "-o", tmp_path / "p.html", "--json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    assert result.exit_code == 0, result.output
    assert as_json(result.output)["name"] == "standard input"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{tmp}/none.txt"], 1, "inspect WINDOW_ID --run OUT"),
        (["{tmp}"], 1, "is a folder"),
        (["{tmp}/short.txt"], 1, "take --span"),
        (["{tmp}/latin.txt"], 1, "no UTF-8 text (invalid start byte at byte 2)"),
        (["{tmp}/short.txt", "--document", "2"], 2, "--document picks one of a file of documents"),
        (["{corpus}/a.jsonl", "--document", "nobody"], 1, "by number they are 0 to 4"),
        (["{corpus}/a.jsonl", "--window", "512", "--index", "99"], 2, "is --index"),
        (["{corpus}/a.jsonl", "--text-key", "body"], 1, "missing text key 'body'"),
        (["{corpus}/a.jsonl", "--span", "1"], 2, "take --span"),
        (["{corpus}/a.jsonl", "--layers", "7"], 2, "has the layers 0 to 2"),
        (["nothing", "--run", "{tmp}"], 1, "Run 'longsift windows' first"),
        (["code-00:0", "--run", "{run}"], 1, "The closest ids are 'code-0:0'"),
        (["code-0:0", "--run", "{run}", "--window", "99"], 2, "for files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_looked_at_is_one_line_that_names_the_fix(
    arguments, code, message, corpus, model, finished, tmp_path
):
    (tmp_path / "short.txt").write_text("Not much.", "utf-8")
    (tmp_path / "latin.txt").write_bytes("Grüße aus Köln".encode("latin-1"))
    given = [argument.format(tmp=tmp_path, corpus=corpus, run=finished) for argument in arguments]
    calculator = [] if "--run" in given else ["--model", model]
    output = longsift("inspect", *given, *calculator, "-o", tmp_path / "page.html", code=code)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "page.html").exists()


def test_a_run_of_another_tokenizer_is_refused(finished):
    with pytest.raises(UsageError, match="does not share"):
        Inspector.of_run(finished, ModelOptions(model="embedded"))


# --- the page ---


@pytest.mark.parametrize(
    ("length", "span"), [(512, 128), (32_768, 128), (32_895, 128), (32_896, 256), (65_536, 256), (1 << 20, 4096)]
)
def test_longer_windows_have_longer_passages(length, span):
    assert default_span(length) == span
    assert length // span <= 256


@pytest.mark.parametrize(("layers", "heads"), [(3, 4), (80, 0)], ids=["with heads", "many layers"])
def test_a_page_of_a_long_window_stays_below_3_mb(layers, heads):
    rng = np.random.default_rng(0)
    shares = np.tril(rng.dirichlet(np.ones(256), (layers, 256)).astype(np.float32))
    found = DependencyMap(
        shares,
        tuple(range(layers)),
        128,
        32_768,
        heads={i: shares[:1].repeat(heads, 0) for i in range(layers if heads else 0)},
    )
    texts = ["", *(library_text("argparse.py")[i * 300 : i * 300 + 700] for i in range(256))]
    calculator = {"model": "m", "revision": None, "dtype": "float32", "device": "cpu"}
    subject = Subject("long", np.zeros(32_768, np.int32))
    html = Inspection(subject, found, texts, calculator, decoded=True).page()
    assert 1_000_000 < len(html.encode()) < 3_000_000


def test_layers_that_do_not_fit_are_left_out_evenly(exact):
    found = dependency_map(exact, ids_of(160), span=16)
    many = replace(found, layers=tuple(range(90)), shares=np.repeat(found.shares, 30, 0))
    assert page._shown_layers(many) == many.layers
    long = replace(many, shares=np.zeros((90, 256, 256), np.float32))
    shown = page._shown_layers(long)
    assert shown[0] == 0
    assert shown[-1] == 89
    assert len(shown) * page.triangle(256) <= 1_100_000
