"""`longsift train-calculator`, end to end at a tiny size: what it writes, goes on from, and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import transformers
import typer.main
import yaml
from safetensors.torch import load_file

from checkpoints import make_checkpoint
from conftest import library_text
from longsift.calculators.interface import rope_of
from longsift.cli import app
from longsift.errors import InputError, ModelError, OutputError, UsageError
from longsift.scoring import Scorer
from longsift.training import calculator
from longsift.training.calculator import train_calculator
from longsift.training.card import plot_losses
from longsift.training.estimate import estimate_training, window_flops
from longsift.training.hf_trainer import last_checkpoint, position_edges
from longsift.training.options import TrainOptions
from longsift.training.processes import Processes

# Eight steps of four windows in two passes; every third is kept.
SMALL = {
    "window": 128,
    "batch_tokens": 512,
    "device_batch": 2,
    "tokens": 4096,
    "rate": 1e-3,
    "beta2": 0.95,
    "warmup": 0.2,
    "save_every": 3,
    "device": "cpu",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small are slower on two threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(model: Path | None, **given) -> TrainOptions:
    return TrainOptions(model=None if model is None else str(model), **{**SMALL, **given})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def as_flags(options: dict) -> list[str]:
    return [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def long_run(model: Path, corpus: Path) -> TrainOptions:
    return options(
        model,
        tokens=24 * 512,
        window=256,
        rate=5e-3,
        rope_theta=500_000.0,
        validation=str(corpus),
        validation_windows=16,
        validate_every=16,
    )


@pytest.fixture(scope="module")
def trained(model, corpus, tmp_path_factory):
    """A small model continued on the documents, with another RoPE base; the folder and the result."""
    out = tmp_path_factory.mktemp("trained") / "calculator"
    given = long_run(model, corpus)
    return out, train_calculator([str(corpus)], out, given, quiet=True)


def test_training_lowers_the_loss(trained):
    _, result = trained
    assert (result["steps"], result["tokens"]) == (24, 24 * 512)
    assert result["loss"] < 6.5  # it begins above 7
    assert result["filled"] > 0.9


def test_the_loss_is_measured_by_position(trained):
    _, result = trained
    assert [row["from_position"] for row in result["loss_by_position"]] == [0]
    assert position_edges(4096) == (0, 256, 1024, 4096)
    total = sum(row["tokens"] * row["loss"] for row in result["loss_by_position"])
    assert total / sum(row["tokens"] for row in result["loss_by_position"]) == pytest.approx(result["validation_loss"])


def test_the_validation_loss_is_that_of_the_saved_model(trained, corpus):
    out, result = trained
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    given = options(None, from_scratch=str(out), tokenizer=str(out), window=256)
    windows = calculator.Plan(given, [str(corpus)]).pack(
        [str(corpus)], out.parent / "again", Processes(first=True), True
    )
    with torch.no_grad():
        sums = torch.zeros(2, dtype=torch.float64)
        for index in range(len(windows)):
            batch = {name: torch.from_numpy(array)[None] for name, array in windows[index].items()}
            count = int((batch["labels"] != -100).sum())
            sums += torch.tensor([float(model(**batch).loss) * count, count])
    assert result["loss_by_position"][0]["tokens"] < sums[1]  # 16 windows were measured
    assert result["validation_loss"] == pytest.approx(float(sums[0] / sums[1]), rel=0.05)


def test_the_folder_is_a_calculator(trained):
    out, _ = trained
    scorer = Scorer("ladm", model=str(out), span=8, d_afs=1, d_cds=1)
    scores = scorer.score([library_text("inspect.py")[:20_000]], window=256)
    assert scores["status"].to_pylist() == ["ok"] * scores.num_rows
    assert scores.num_rows > 5


def test_the_folder_is_an_ordinary_model(trained, model):
    out, _ = trained
    config = transformers.AutoConfig.from_pretrained(out)
    assert rope_of(config)["rope_theta"] == 500_000
    assert config.use_cache
    assert transformers.AutoTokenizer.from_pretrained(out)("def f():")["input_ids"]
    assert weights(out).keys() == weights(model).keys()
    assert {path.name for path in out.iterdir() if path.is_dir()} == set()


def test_the_card_states_recipe_data_and_figures(trained):
    out, result = trained
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    for fact in ("12,288 in 24 steps of 512", "0.95", "| code |", "| mixed |", f"{result['validation_loss']:.4f}"):
        assert fact in text
    assert "500000" in text
    plot = ElementTree.parse(out / "loss.svg").getroot()
    line = plot.find("{*}polyline[@class='training']").get("points").split()
    assert len(line) == 24
    assert len(plot.findall("{*}circle[@class='validation']")) == 2


def test_a_finished_run_is_not_trained_again(trained, model, corpus):
    out, result = trained
    before = (out / "model.safetensors").stat().st_mtime_ns
    given = long_run(model, corpus)
    assert train_calculator([str(corpus)], out, given, quiet=True) == json.loads(json.dumps(result))
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_another_run_in_the_folder_is_refused(trained, model, corpus):
    with pytest.raises(OutputError, match=r"with other .*rate"):
        train_calculator([str(corpus)], trained[0], options(model, rate=5e-4), quiet=True)


def test_the_model_that_is_continued_is_not_overwritten(trained, corpus):
    before = (trained[0] / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UsageError, match="Choose another output folder"):
        train_calculator([str(corpus)], trained[0], options(trained[0]), overwrite=True, quiet=True)
    assert (trained[0] / "model.safetensors").stat().st_mtime_ns == before


def test_a_kernel_that_cannot_be_had_is_refused_before_any_work(model, corpus, tmp_path):
    with pytest.raises(UsageError, match="--attention flex needs a CUDA device"):
        train_calculator([str(corpus)], tmp_path / "out", options(model, attention="flex"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_other_files_in_the_folder_are_refused(model, corpus, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        train_calculator([str(corpus)], tmp_path, options(model), overwrite=True, quiet=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.fixture(scope="module")
def straight(model, corpus, tmp_path_factory):
    """Weights of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight") / "out"
    train_calculator([str(corpus)], out, options(model), quiet=True)
    return weights(out)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(straight, model, corpus, tmp_path):
    command = [sys.executable, "-m", "longsift", "train-calculator", str(corpus), "-o", str(tmp_path / "out")]
    flags = ["--model", str(model), *as_flags(SMALL), "-q"]
    process = subprocess.Popen([*command, *flags], env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoints = tmp_path / "out" / "checkpoints"
    while last_checkpoint(checkpoints) is None and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = train_calculator([str(corpus)], tmp_path / "out", options(model), quiet=True)
    assert result["resumed_at_step"] in (3, 6)
    assert same_bits(weights(tmp_path / "out"), straight)
    assert not checkpoints.exists()


def test_a_run_that_was_trained_but_could_not_be_saved_is_saved_next_time(
    straight, model, corpus, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(calculator, "_save", fail)
        with pytest.raises(OSError, match="disk is full"):
            train_calculator([str(corpus)], tmp_path / "out", options(model), quiet=True)
    result = train_calculator([str(corpus)], tmp_path / "out", options(model), quiet=True)
    assert result["resumed_at_step"] == 8
    assert same_bits(weights(tmp_path / "out"), straight)


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    for step, name in ((4, "complete.json"), (12, "complete.json"), (16, "model.safetensors")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-12"


def test_two_processes_train_as_one(straight, model, corpus, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "longsift", "train-calculator", str(corpus), "-o", str(tmp_path / "out"), "--json", "-q"]
    done = subprocess.run(
        [*launch, *command, "--model", str(model), *as_flags(SMALL)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert (result["processes"], result["steps"]) == (2, 8)
    one, two = straight, weights(tmp_path / "out")
    # Sums in another order: the same to rounding, which AdamW's first steps enlarge.
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)


def test_overwrite_begins_anew(straight, model, corpus, tmp_path):
    train_calculator([str(corpus)], tmp_path / "out", options(model, tokens=512), quiet=True)
    assert not same_bits(weights(tmp_path / "out"), straight)
    train_calculator([str(corpus)], tmp_path / "out", options(model), overwrite=True, quiet=True)
    assert same_bits(weights(tmp_path / "out"), straight)


def test_activation_checkpointing_changes_no_result(straight, model, corpus, tmp_path):
    train_calculator([str(corpus)], tmp_path / "out", options(model, activation_checkpointing=False), quiet=True)
    kept = weights(tmp_path / "out")
    assert all(torch.allclose(straight[name], kept[name], rtol=1e-4, atol=1e-6) for name in kept)


def test_a_model_from_scratch_needs_a_configuration_and_a_tokenizer(model, corpus, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = options(
        None,
        from_scratch=str(tmp_path / "config.json"),
        tokenizer=str(model),
        tokens=512,
        data=str(tmp_path / "data"),
        schedule="cosine",
        dtype="bfloat16",
    )
    train_calculator([str(corpus)], tmp_path / "out", given, quiet=True)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.config.max_position_embeddings == 128  # raised to the window
    assert saved.dtype == torch.bfloat16
    assert (tmp_path / "data" / "train" / "tokens.bin").exists()  # kept, for other runs


def test_a_dry_run_writes_nothing(model, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = estimate_training([str(corpus)], options(model))
    assert plan["steps"] == 8
    assert plan["step_tokens"] == 512
    assert plan["documents"] == 12
    assert plan["seconds_a_step"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_corpus_is_estimated_as_it_is_packed(trained, model, corpus):
    out, _ = trained
    counts = {
        name: int(n.replace(",", "")) for name, n in _rows((out / "README.md").read_text()) if name in ("code", "mixed")
    }
    plan = estimate_training([str(corpus)], options(model, window=256))
    assert plan["corpus_tokens"] == pytest.approx(sum(counts.values()), rel=0.02)


def _rows(text: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == 2]


def test_operations_are_six_for_a_weight_and_twelve_for_a_pair():
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 100 * 32
    pairs = 10 * 11 / 2
    assert window_flops(model, pairs, 10, False) == 6 * matrices * 10 + 12 * 32 * 2 * pairs
    assert window_flops(model, pairs, 10, True) == 4 / 3 * window_flops(model, pairs, 10, False)


def test_a_loss_that_is_no_number_ends_the_run(model, corpus, tmp_path):
    with pytest.raises(ModelError, match=r"The loss is (nan|inf) at step \d+\. Start anew with a lower --rate"):
        train_calculator([str(corpus)], tmp_path / "out", options(model, rate=1e30, warmup=0.0), quiet=True)


def test_missing_packages_are_named(model, corpus, tmp_path, monkeypatch):
    find = calculator.importlib.util.find_spec
    monkeypatch.setattr(
        calculator.importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else find(name, *a)
    )
    with pytest.raises(UsageError, match=r"pip install 'longsift\[train\]'"):
        train_calculator([str(corpus)], tmp_path / "out", options(model), quiet=True)
    assert not (tmp_path / "out").exists()


def test_learned_positions_cannot_be_made_longer(model, corpus, tmp_path):
    config = transformers.GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    given = options(tmp_path / "gpt2", tokenizer=str(model))
    with pytest.raises(ModelError, match=r"learned positions for 64 tokens.*--window 64"):
        train_calculator([str(corpus)], tmp_path / "out", given, quiet=True)


def test_a_tokenizer_larger_than_the_model_is_refused(model, corpus, tmp_path):
    small = make_checkpoint(tmp_path / "small", "llama", vocab_size=64)
    with pytest.raises(ModelError, match="the model's vocabulary is 64"):
        train_calculator([str(corpus)], tmp_path / "out", options(small, tokenizer=str(model)), quiet=True)


def test_no_documents_are_said(model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="nothing to train on"):
        train_calculator([str(tmp_path / "empty.jsonl")], tmp_path / "out", options(model), quiet=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "either --model"),
        ({"model": "a", "from_scratch": "b"}, "either --model"),
        ({"from_scratch": "config.json"}, "needs --tokenizer"),
        ({"model": "a", "window": 8}, "--window is at least 16"),
        ({"model": "a", "beta2": 1.0}, "--beta2 is between 0 and 1"),
        ({"model": "a", "warmup": 1.5}, "--warmup is a share"),
        ({"model": "a", "rate": 0.0}, "--rate is a positive number"),
        ({"model": "a", "seed": -1}, "--seed is a 32-bit number"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, dict) else "",
)
def test_options_that_cannot_work_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        TrainOptions(**flags)


def test_a_batch_smaller_than_a_pass_is_refused(model, corpus, tmp_path):
    with pytest.raises(UsageError, match="--batch-tokens 128 is less than one pass of all devices, 256"):
        train_calculator([str(corpus)], tmp_path / "out", options(model, batch_tokens=100 + 28), quiet=True)


def test_the_documented_commands_exist_with_their_flags():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text().replace("\\\n", " ")
    shown = [
        line.partition("longsift ")[2].split() for line in text.splitlines() if re.match("(longsift|torchrun) ", line)
    ]
    assert [name for name, *_ in shown] == ["train-calculator", "score", "train-calculator"]
    commands = typer.main.get_command(app).commands
    for name, *arguments in shown:
        known = {flag for parameter in commands[name].params for flag in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= known


def test_the_defaults_are_the_papers_recipe(corpus):
    given = TrainOptions(model="embedded")
    assert (given.window, given.batch_tokens, given.beta2) == (32_768, 1 << 20, 0.999)
    assert calculator.Plan(given, [str(corpus)]).rate == 2e-5


def test_help_imports_no_torch():
    code = "import sys; from longsift.cli import app; app(['train-calculator', '--help'], standalone_mode=False)"
    check = "; assert not {'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + check], check=True, stdout=subprocess.DEVNULL)


def test_the_plot_shows_every_loss():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"step": 2, "x": 1}]
    plot = ElementTree.fromstring(plot_losses(history, 1000))
    points = [tuple(map(float, point.split(","))) for point in plot.find("{*}polyline").get("points").split()]
    (dot,) = plot.findall("{*}circle")
    assert points[0][0] < points[1][0] == float(dot.get("cx"))
    assert points[0][1] < float(dot.get("cy")) < points[1][1]
