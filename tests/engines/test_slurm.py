"""Slurm: a job array of datatrove's executor, on a real cluster of two local nodes (`make test-slurm`)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

import slurm_cluster
from slurm_cluster import slurm, wait_for_jobs

pytest.importorskip("datatrove", reason="needs longsift[datatrove]")

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from longsift.engines.datatrove import AttentionScores

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason="needs Debian's slurm-wlm and munge"),
]


@pytest.fixture(scope="module")
def cluster():
    """The folder of a running cluster."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder, slurm(Path(folder)):
        yield Path(folder)


def test_a_job_array_gives_the_bits_of_a_run(cluster, corpus, ladm, table, documents, tmp_path):
    SlurmPipelineExecutor(
        [JsonlReader(str(corpus)), AttentionScores(**ladm, per="window"), JsonlWriter(str(tmp_path / "out"))],
        tasks=2,
        time="00:10:00",
        partition="main",
        mem_per_cpu_gb=4,
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        logging_dir=str(tmp_path / "logs"),
        slurm_logs_folder=str(tmp_path / "slurm"),
    ).run()
    wait_for_jobs(cluster)
    logs = "\n".join(path.read_text("utf-8") for path in (tmp_path / "slurm").iterdir())
    assert len(list((tmp_path / "logs" / "completions").iterdir())) == 2, logs
    written = {row.id: row for row in JsonlReader(str(tmp_path / "out")).run()}
    scores, windows = table("scores"), table("windows")
    assert written.pop("mixed-5").metadata["longsift"]["status"] == "too short"
    assert written.keys() == scores.keys()
    for name, window in written.items():
        own = window.metadata["longsift"]
        of_the_run = scores[name] | {key: windows[name][key] for key in ("index", "start")}
        assert own == {key: of_the_run[key] for key in own}
        assert window.text == windows[name]["text"]
    stats = json.loads((tmp_path / "logs" / "stats.json").read_text("utf-8"))  # of the dependent job
    counted = next(step["stats"] for step in stats if step["name"] == repr(AttentionScores()))
    assert counted["documents"]["total"] == len(documents)
