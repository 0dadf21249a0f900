"""Recorded forwards: the same bits as run anew, in no more memory than there is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import make_checkpoint
from longsift.attention import span_focus
from longsift.calculators.full import FullModel, attention_output
from longsift.calculators.interface import run
from longsift.calculators.recorded import Recorder, Waits
from longsift.methods.calibrated import STATISTICS, Calibrated, Calibration, Feature, Fit
from longsift.methods.ladm import Ladm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LADM = Ladm(span=16, d_afs=2, d_cds=2)
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}  # looks at the largest position
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "smollm3"]


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        pytest.param(lambda x: (x + 1).sum(-1), False, id="arithmetic"),
        pytest.param(lambda x: x[torch.arange(2)], False, id="rows by number"),
        pytest.param(lambda x: torch.tensor([0, 2]), True, id="numbers of the host"),
        pytest.param(lambda x: x.double(), False, id="another type"),
        pytest.param(lambda x: x.sum().item(), True, id="a number read back"),
        pytest.param(lambda x: 1 if (x > 0).all() else 0, True, id="a branch"),
        pytest.param(lambda x: x[x > 0], True, id="rows by a mask"),
        pytest.param(lambda x: x.nonzero(), True, id="places of numbers"),
        pytest.param(lambda x: x.to("meta"), True, id="a copy to another device"),
        pytest.param(lambda x: torch.equal(x, x), True, id="a comparison"),
    ],
)
def test_operations_in_which_the_host_waits_are_noted(operation: Callable[..., object], waits: bool) -> None:
    with Waits("cpu") as seen:
        operation(torch.ones(3, 3))
    assert (seen.found is not None) == waits
    with Waits("cuda") as seen:
        operation(torch.ones(3, 3))
    assert seen.found is None


@pytest.mark.parametrize(
    ("family", "changes", "waits"),
    [
        pytest.param("llama", {}, False, id="llama"),
        pytest.param("smollm3", {}, False, id="some layers without positions"),
        pytest.param("llama", DYNAMIC, True, id="dynamic RoPE"),
    ],
)
def test_a_forward_waits_only_where_its_architecture_does(
    family: str, changes: dict[str, object], waits: bool, tmp_path: Path
) -> None:
    model = FullModel.load(str(make_checkpoint(tmp_path, family, **changes)))
    ids = windows(1, 60, "cpu")
    run(model._network, ids, attention_output)  # reads the rule of the mask, once
    with Waits("cpu") as seen:
        run(model._network, ids, attention_output)
    assert (seen.found is not None) == waits


def windows(count: int, length: int = 700, device: str = "cuda") -> torch.Tensor:
    return torch.randint(160, (count, length), generator=torch.Generator().manual_seed(length)).to(device)


def calibrated(folder: str, path: Path) -> Calibrated:
    layer = 2 if "gemma3" in folder else 1  # a global one
    features = tuple(
        Feature(layer, head, statistic, mean=-2.0, scale=2.0, weight=1.0, square=0.1)
        for head in (0, 1, 3)
        for statistic in STATISTICS
    )
    Calibration(FullModel.load(folder).identity(), (Fit(700, 16, features),)).write(path)
    return Calibrated(str(path))


def same(ours: dict[str, object], theirs: dict[str, object]) -> None:
    for name, column in ours.items():
        if isinstance(column, torch.Tensor):
            assert torch.equal(column, theirs[name]), name
        else:
            assert column == theirs[name]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["ladm", "calibrated"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_replay_gives_the_bits_of_a_forward(family: str, kind: str, tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / family, family))
    method = LADM if kind == "ladm" else calibrated(folder, tmp_path / "calibration.json")
    model, other = (FullModel.load(folder, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ids = windows(4)
    anew = [method.measure(model, ids[:1])]  # the first time: as it is
    method.measure(model, ids[:1])
    assert model._recorder.recorded == 0
    together = method.measure(model, ids)  # recorded, and replayed
    assert model._recorder.recorded == 1
    other._recorder = None
    anew += [method.measure(other, row[None]) for row in ids[1:]]
    for i, row in enumerate(anew):
        same(row, {name: x[i : i + 1] if isinstance(x, torch.Tensor) else x for name, x in together.items()})
    # Another length, and then the first again.
    for _ in range(3):
        method.measure(model, windows(1, 500))
    assert model._recorder.recorded == 2
    same(method.measure(model, ids), together)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recorded", [True, False], ids=["replayed", "anew"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_host_does_not_wait_after_the_first_window(family: str, recorded: bool, tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / family, family))
    methods = LADM, calibrated(folder, tmp_path / "calibration.json")
    model = FullModel.load(folder, device="cuda", dtype=torch.bfloat16)
    if not recorded:
        model._recorder = None
    ids = windows(2)
    for method in methods:
        expected = [method.measure(model, ids) for _ in range(2)][1]  # four windows
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            measured = method.measure(model, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        same(measured, expected)


@pytest.mark.gpu
@needs_gpu
@torch.inference_mode()
def test_a_forward_in_which_the_host_waits_is_run_anew(tmp_path: Path) -> None:
    model = FullModel.load(str(make_checkpoint(tmp_path, "llama", **DYNAMIC)), device="cuda", dtype=torch.bfloat16)
    rows = [LADM.measure(model, windows(1)) for _ in range(4)]
    assert model._recorder.recorded == 0
    same(rows[0], rows[3])


PROGRAM = """
import sys, torch
from longsift.calculators.full import FullModel
from longsift.methods.ladm import Ladm
model = FullModel.load(sys.argv[1], device="cuda", dtype=torch.bfloat16)
ids = torch.randint(160, (4, 700), generator=torch.Generator().manual_seed(700)).cuda()
with torch.inference_mode():
    rows = Ladm(span=16, d_afs=2, d_cds=2).measure(model, ids.flip(0))["cds_layers"]
print([x.hex() for x in rows.flip(0).flatten().tolist()])
"""


@pytest.mark.gpu
@needs_gpu
@torch.inference_mode()
def test_another_process_gives_the_same_bits(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path, "qwen3"))
    here = LADM.measure(FullModel.load(folder, device="cuda", dtype=torch.bfloat16), windows(4))["cds_layers"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([x.hex() for x in here.flatten().tolist()])


@pytest.mark.gpu
@needs_gpu
@torch.inference_mode()
def test_a_forward_that_runs_out_of_memory_leaves_the_model_usable(tmp_path: Path) -> None:
    model = FullModel.load(str(make_checkpoint(tmp_path, "llama")), device="cuda", dtype=torch.bfloat16)
    small, large = windows(1), windows(1, 1_000_000)
    expected = [LADM.measure(model, small) for _ in range(3)][2]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    try:
        for _ in range(2):  # with recordings, and without
            with pytest.raises(torch.OutOfMemoryError):
                LADM.measure(model, large)
            assert model._recorder.recorded == 0
            same(LADM.measure(model, small), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@needs_gpu
def test_a_recording_that_fails_leaves_the_gpu_usable() -> None:
    recorder = Recorder(torch.device("cuda"))
    x = torch.randn(1, 64, device="cuda")
    q, k = torch.randn(2, 1, 1, 64, 16, device="cuda")
    read: list[float] = []

    def compute(x: torch.Tensor) -> dict[str, torch.Tensor]:
        if torch.cuda.is_current_stream_capturing():
            read.append(float(x.sum()))  # which ends the recording
        return {"focus": span_focus(q, k, 8) + x.sum()}

    rows = [recorder.run("key", compute, x)["focus"] for _ in range(4)]
    assert recorder.recorded == 0
    assert not read
    assert all(torch.equal(rows[0], row) for row in rows)
    other = [recorder.run("other", lambda x: {"twice": 2 * x}, x)["twice"] for _ in range(4)]
    assert recorder.recorded == 1
    assert all(torch.equal(row, 2 * x) for row in other)
