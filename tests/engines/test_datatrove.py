"""The steps for datatrove: scores as of a run of longsift, in a real pipeline with its reader, executor and writer."""

from __future__ import annotations

import json
import math
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import longsift
from longsift.errors import UsageError

pytest.importorskip("datatrove", reason="needs longsift[datatrove]")

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from longsift.engines import datatrove as steps
from longsift.engines.datatrove import AttentionFilter, AttentionScores, thresholds


@pytest.fixture
def scored(ladm):
    """Scores texts, each as a document whose id is its place."""

    def score(*texts: str, **options) -> list[Document]:
        return list(AttentionScores(**ladm, **options).run(Document(text, str(i)) for i, text in enumerate(texts)))

    return score


def test_a_pipeline_of_two_tasks_gives_the_bits_of_a_run_and_leaves_all_else(corpus, ladm, table, documents, tmp_path):
    LocalPipelineExecutor(
        [
            JsonlReader(str(corpus), add_file_path=False),
            AttentionScores(**ladm),
            AttentionScores("longattn", model=ladm["model"], window=ladm["window"], device="cpu", key="first layer"),
            JsonlWriter(str(tmp_path / "out")),
        ],
        tasks=2,
        logging_dir=str(tmp_path / "logs"),
    ).run()
    assert len(list((tmp_path / "out").iterdir())) == 2
    written = {document.id: document for document in JsonlReader(str(tmp_path / "out"), add_file_path=False).run()}
    assert written.keys() == documents.keys()
    windows, scores = table("windows"), table("scores")
    first_layer = longsift.Scorer("longattn", model=ladm["model"], device="cpu")
    for name, document in written.items():
        assert document.text == documents[name]["text"]
        assert {**document.metadata, "id": name, "text": document.text} == {
            **documents[name],
            "longsift": document.metadata["longsift"],
            "first layer": document.metadata["first layer"],
        }
        if name == "mixed-5":
            continue
        own = document.metadata["longsift"].pop("windows")
        of_the_run = [scores[f"{name}:{row['index']}"] for row in own]
        assert len(own) == sum(window.startswith(f"{name}:") for window in scores)
        for row, window in zip(own, of_the_run, strict=True):
            assert row == {key: window[key] for key in row if key not in ("index", "start")} | {
                "index": row["index"],
                "start": windows[window["window_id"]]["start"],
            }
        assert document.metadata["longsift"] == max(own, key=lambda row: row["cds"])
        alone = first_layer.score([document.text], window=ladm["window"])
        for column in ("dependency_strength", "variance"):
            own = [row[column] for row in document.metadata["first layer"]["windows"]]
            assert own == alone[column].to_pylist()
    short = written["mixed-5"].metadata["longsift"]
    assert short.pop("reason").endswith("tokens, fewer than a window of 512")
    nothing = dict.fromkeys(["index", "start", "n_tokens", "cds", "cds_layers", "layers"])
    assert short == {**nothing, "status": "too short", "windows": []}
    stats = json.loads((tmp_path / "logs" / "stats.json").read_text("utf-8"))
    counted = next(step["stats"] for step in stats if step["name"] == repr(AttentionScores()))
    assert (counted["documents"], counted["documents too short"]) == (12, 1)
    assert (counted["windows ok"], counted["tokens"]["total"]) == (len(scores), ladm["window"] * len(scores))


def test_the_best_share_of_every_group_of_windows_is_kept(corpus, ladm, table, tmp_path):
    windows, scores = table("windows"), table("scores")
    best: set[str] = set()
    for group in ("code", "mixed"):
        own = sorted((row for row in scores.values() if row["group"] == group), key=lambda row: -row["cds"])
        best |= {row["window_id"] for row in own[: math.ceil(0.3 * len(own))]}
    LocalPipelineExecutor(
        [JsonlReader(str(corpus)), AttentionScores(**ladm, per="window"), JsonlWriter(str(tmp_path / "scored"))],
        tasks=2,
        workers=1,
        logging_dir=str(tmp_path / "logs"),
    ).run()
    least = thresholds(JsonlReader(str(tmp_path / "scored")).run(), 0.3, column="cds")
    assert least.keys() == {"code", "mixed"}
    LocalPipelineExecutor(
        [
            JsonlReader(str(tmp_path / "scored")),
            AttentionFilter(least, column="cds", exclusion_writer=JsonlWriter(str(tmp_path / "dropped"))),
            JsonlWriter(str(tmp_path / "kept")),
        ],
        tasks=2,
        workers=1,
        logging_dir=str(tmp_path / "more logs"),
    ).run()
    kept = {document.id: document for document in JsonlReader(str(tmp_path / "kept")).run()}
    dropped = {document.id: document for document in JsonlReader(str(tmp_path / "dropped")).run()}
    assert kept.keys() == best
    assert kept.keys() | dropped.keys() == {*windows, "mixed-5"}
    for name, document in kept.items():
        assert document.text == windows[name]["text"]
        assert document.metadata["longsift"]["cds"] == scores[name]["cds"]
        assert document.metadata["stars"] == json.loads(windows[name]["metadata"])["stars"]
    reasons = {name: document.metadata["filter_reason"] for name, document in dropped.items()}
    assert reasons.pop("mixed-5") == "too_short"
    assert set(reasons.values()) == {"below_threshold"}


def test_a_model_is_loaded_once_a_process_and_its_options(ladm):
    step = AttentionScores(**ladm)
    again = pickle.loads(pickle.dumps(step))
    assert step._scorer(0) is again._scorer(7)
    assert step._scorer(0) is not AttentionScores(**ladm, dtype="bfloat16")._scorer(0)


def test_nothing_is_loaded_for_a_task_without_documents():
    assert list(AttentionScores(model="there-is-none").run(iter(()))) == []


@pytest.mark.parametrize(
    ("gpus", "chosen"),
    [(0, ["cpu", "cpu", "cpu"]), (1, ["cuda:0", "cuda:0", "cuda:0"]), (2, ["cuda:0", "cuda:1", "cuda:0"])],
    ids=["no GPU", "one, as Slurm gives it", "two"],
)
def test_workers_take_the_gpus_that_they_see_in_turn(gpus, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert [steps.choose_device("auto", rank) for rank in range(3)] == chosen
    assert steps.choose_device("cpu", 1) == "cpu"


@pytest.mark.parametrize("per", ["document", "window"])
def test_a_document_that_cannot_be_tokenised_fails_alone(per, scored, documents):
    good = documents["code-0"]["text"]
    alone = scored(good, per=per)
    first, broken, *last = scored(good, "\ud800" + good, good, per=per)[len(alone) - 1 :]
    assert first.metadata == alone[-1].metadata
    assert [document.metadata for document in last] == [document.metadata for document in alone]
    state = broken.metadata["longsift"]
    assert (broken.id, state["status"], state["cds"]) == ("1", "failed", None)
    assert "tokenizer failed" in state["reason"]


def test_batches_change_no_score(scored, documents, monkeypatch):
    texts = [row["text"][:4000] for row in list(documents.values())[:4]]
    together = scored(*texts)
    monkeypatch.setattr(steps, "_BATCH_CHARS", 1)
    assert scored(*texts) == together


def test_scores_go_into_parquet_with_a_schema_of_the_writer(ladm, scored, documents, tmp_path):
    some = scored("short", *(row["text"] for row in list(documents.values())[:3]))
    scores = AttentionScores(**ladm).arrow_type()
    fields = [("text", pa.string()), ("id", pa.string()), ("metadata", pa.struct([("longsift", scores)]))]
    with ParquetWriter(str(tmp_path), schema=pa.schema(fields), batch_size=1) as writer:
        for document in some:
            writer.write(document)
    (path,) = tmp_path.glob("*.parquet")
    written = pq.read_table(path).to_pylist()
    assert [row["metadata"] for row in written] == [document.metadata for document in some]
    assert written[0]["metadata"]["longsift"]["status"] == "too short"


class TestFilter:
    def document(self, **scores) -> Document:
        return Document("text", "7", metadata={"source": "book", "longsift": scores})

    @pytest.mark.parametrize(
        ("scores", "outcome"),
        [
            ({"status": "ok", "calibrated": 0.5}, True),
            ({"status": "ok", "calibrated": 0.49}, (False, "below_threshold")),
            ({"status": "failed", "calibrated": None}, (False, "failed")),
            ({"status": "too short", "calibrated": None}, (False, "too_short")),
        ],
        ids=["just enough", "less", "failed", "too short"],
    )
    def test_it_keeps_what_reaches_the_threshold(self, scores, outcome):
        assert AttentionFilter(0.5).filter(self.document(**scores)) == outcome
        assert AttentionFilter({"book": 0.5, "web": 9.0}).filter(self.document(**scores)) == outcome

    @pytest.mark.parametrize(
        ("options", "scores", "message"),
        [
            ({"threshold": 0.5, "key": "other"}, {}, "no scores under 'other': put AttentionScores before"),
            ({"threshold": 0.5}, {"status": "ok", "cds": 1.0}, "no score 'calibrated'; it has cds"),
            ({"threshold": {"web": 0.5}}, {"status": "ok", "calibrated": 1.0}, "of the group 'book', which has no"),
            (
                {"threshold": {"a": 0.5}, "group_by": "kind"},
                {"status": "ok", "calibrated": 1.0},
                "no 'kind' in its metadata",
            ),
        ],
        ids=["no scores", "another method's", "a foreign group", "no group"],
    )
    def test_what_it_cannot_judge_is_an_error(self, options, scores, message):
        with pytest.raises(UsageError, match=message):
            AttentionFilter(**options).filter(self.document(**scores))

    def test_thresholds_keep_a_share_rounded_up_of_every_group(self):
        values = {"a": [3.0, 1.0, 2.0], "b": [float(i) for i in range(30)], None: [1.0]}
        documents = [
            Document("", "", metadata={"longsift": {"status": "ok", "calibrated": value}, "source": group})
            for group, some in values.items()
            for value in some
        ]
        documents.append(self.document(status="failed"))
        assert thresholds(documents, 0.1) == {"a": 3.0, "all": 1.0, "b": 27.0}
        assert thresholds(documents, 1.0) == {"a": 1.0, "all": 1.0, "b": 0.0}

    @pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan")])
    def test_a_share_out_of_range_is_an_error(self, keep):
        with pytest.raises(UsageError, match="share above 0"):
            thresholds([], keep)


def test_what_a_step_cannot_do_is_said_before_a_task_begins():
    with pytest.raises(UsageError, match="per is 'document' or 'window', not 'page'"):
        AttentionScores(per="page")


def test_without_datatrove_the_import_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "datatrove"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "longsift.engines.datatrove")
    with pytest.raises(ImportError, match=r"pip install 'longsift\[datatrove\]'"):
        import longsift.engines.datatrove  # noqa: F401
