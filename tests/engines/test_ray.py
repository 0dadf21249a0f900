"""The class for Ray Data: scores as of a run of longsift, on a real cluster of two local nodes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from longsift.engines.ray import AttentionScores
from longsift.errors import UsageError

MEASURES = ["n_tokens", "status", "reason", "cds", "cds_layers", "layers"]


@pytest.fixture
def scores(ladm):
    def make(**options) -> AttentionScores:
        return AttentionScores(**{**ladm, **options})

    return make


class TestOnACluster:
    @pytest.fixture(scope="class")
    def ray(self):
        """Ray on two nodes, both on this machine, which offer three CPUs each."""
        ray = pytest.importorskip("ray", reason="needs longsift[ray]")
        pytest.importorskip("ray.data")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        cluster.add_node(num_cpus=3)
        ray.init(address=cluster.address, log_to_driver=False)
        ray.data.DataContext.get_current().wait_for_min_actors_s = 60  # none takes all work before another is there
        yield ray
        ray.shutdown()
        cluster.shutdown()

    @pytest.mark.slow
    def test_rows_get_the_bits_of_a_run_from_an_actor_on_each_node(self, ray, documents, ladm, table):
        class Placed(AttentionScores):
            def __call__(self, batch: pa.Table) -> pa.Table:
                scored = super().__call__(batch)
                here = ray.get_runtime_context().get_node_id()
                return scored.append_column("node", pa.array([here] * len(scored), pa.string()))

        expected, windows = table("scores"), table("windows")
        # Two of a node's three CPUs: there is an actor on each, and a CPU left to read.
        actors = ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1)
        two = {"batch_format": "pyarrow", "batch_size": 2, "num_cpus": 2, "compute": actors}

        whole = pa.Table.from_pylist(list(documents.values()))
        blocks = [whole.slice(first, 2) for first in range(0, len(whole), 2)]
        texts = ray.data.from_arrow(blocks).map_batches(Placed, fn_constructor_kwargs={**ladm, "per": "window"}, **two)
        rows = texts.take_all()
        assert {row["node"] for row in rows} == {node["NodeID"] for node in ray.nodes()}
        measured = {f"{row['id']}:{row['index']}": row for row in rows}
        assert measured.pop("mixed-5:None")["status"] == "too short"
        assert measured.keys() == expected.keys()
        for name, row in measured.items():
            assert {key: row[key] for key in MEASURES} == {key: expected[name][key] for key in MEASURES}
            assert (row["text"], row["start"]) == (windows[name]["text"], windows[name]["start"])
            assert row["stars"] == json.loads(windows[name]["metadata"])["stars"]


def test_windows_of_token_ids_get_the_bits_of_a_run(scores, table):
    expected = table("scores")
    windows = [{key: row[key] for key in ("window_id", "input_ids", "n_tokens")} for row in table("windows").values()]
    rows = scores(column="input_ids", prefix="ladm_")(pa.Table.from_pylist(windows)).to_pylist()
    assert len(rows) == len(expected)
    for row, window in zip(rows, windows, strict=True):
        of_the_run = expected[window["window_id"]]
        assert {key: row[f"ladm_{key}"] for key in MEASURES} == {key: of_the_run[key] for key in MEASURES}
        assert {key: row[key] for key in window} == window


def test_a_row_has_its_best_window_and_a_list_of_all(scores, documents, table):
    expected = table("scores")
    whole = pa.Table.from_pylist(list(documents.values()))
    scored = scores()(whole)
    assert scored.select(whole.column_names).equals(whole)
    for row in scored.to_pylist():
        each = [expected[f"{row['id']}:{i}"] for i in range(len(row["windows"]))]
        assert [[part[key] for key in MEASURES] for part in row["windows"]] == [
            [w[key] for key in MEASURES] for w in each
        ]
        if each:
            best = max(row["windows"], key=lambda part: part["cds"])
            assert {key: row[key] for key in best} == best
        else:
            assert (row["id"], row["status"], row["cds"]) == ("mixed-5", "too short", None)


@pytest.mark.parametrize("per", ["document", "window"])
def test_a_row_that_cannot_be_measured_fails_alone(scores, per):
    good = list(range(3, 3 + 200))
    ids = [good, None, [], [*good[:-1], 512], [1 << 32, *good], good, [5]]
    batch = pa.table({"ids": pa.array(ids, pa.list_(pa.int64())), "name": list("abcdefg")})
    rows = scores(column="ids", per=per)(batch).to_pylist()
    assert [row["name"] for row in rows] == list("abcdefg")
    assert [row["ids"] for row in rows] == ids
    assert [row["status"] for row in rows] == ["ok", *["failed"] * 4, "ok", "failed"]
    assert rows[0]["cds"] == rows[5]["cds"] is not None
    reasons = ["there is no text", "there are no token ids", "Token id 512 is outside", "above 2147483647"]
    for row, reason in zip(rows[1:5], reasons, strict=True):
        assert reason in row["reason"]
        assert row["cds"] is None
    assert "shorter than" in rows[6]["reason"]


def test_columns_have_one_type_whatever_a_batch_holds(scores, documents):
    step = scores()
    table = pa.Table.from_pylist(list(documents.values()))
    short = pa.table({"text": ["too short", None]})
    whole = step(table)
    for batch in (short, short.slice(0, 0)):
        added = step(batch)
        assert added.num_rows == batch.num_rows
        assert [added.schema.field(name) for name in added.column_names[1:]] == [
            whole.schema.field(name) for name in whole.column_names[len(table.column_names) :]
        ]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": np.array(["a"])}, "give map_batches batch_format='pyarrow'"),
        (pa.table({"content": ["a"]}), "no column 'text'; there are content"),
        (pa.table({"text": [1.5]}), "of type double; it must hold texts or lists of token ids"),
        (pa.table({"text": ["a"], "status": [1], "start": [2]}), "columns start, status already: .* a prefix"),
    ],
    ids=["numpy", "no column", "numbers", "taken names"],
)
def test_a_batch_that_it_cannot_take_is_an_error(scores, batch, message):
    with pytest.raises(UsageError, match=message):
        scores()(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "page"}, "'document' or 'window', not 'page'"),
        ({"window": 64}, "A window of 64 tokens is shorter than"),
    ],
)
def test_what_it_cannot_do_is_said_at_once(scores, options, message):
    with pytest.raises(UsageError, match=message):
        scores(**options)


def test_neither_ray_nor_datatrove_is_imported_by_the_rest_of_longsift():
    code = "import sys, longsift.cli, longsift.pipeline, longsift.scoring, longsift.engines.ray; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "longsift.engines.ray" in loaded
    assert not {"ray", "datatrove"} & set(loaded)
