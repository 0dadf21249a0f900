"""No attention across packed documents, whatever the architecture and the kernel."""

from __future__ import annotations

import pytest
import torch
import transformers

from checkpoints import VOCABULARY, make_config
from longsift.errors import UnsupportedModel, UsageError
from longsift.training.packed_attention import FLEX, check_documents_apart, choose_attention

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen3", "mistral-sliding", "gemma2", "gemma3", "olmo2", "smollm3"]


def on_gpu(test):
    """Marks a test that needs a CUDA device and skips it where there is none."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


def build(family: str, attention: str | None = None, device: torch.device = CPU) -> transformers.PreTrainedModel:
    config = make_config(family)
    chosen = attention or choose_attention("auto", CPU, config, 64, 1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=chosen)
    return model.eval().to(device)


def losses(model: transformers.PreTrainedModel, *documents: torch.Tensor) -> list[float]:
    """The loss of each document, when all stand in one window."""
    device = model.device
    ids = torch.cat(documents)[None].to(device)
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None].to(device)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float().cpu()
    parts = logits.split([len(document) for document in documents])
    return [
        float(torch.nn.functional.cross_entropy(part[:-1], document[1:]))
        for part, document in zip(parts, documents, strict=True)
    ]


def some_documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in (61, 100, 3, 92)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_has_the_loss_that_it_has_alone(family):
    model, documents = build(family), some_documents()
    alone = [losses(model, document)[0] for document in documents]
    assert losses(model, *documents) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_one_document_change_no_other_loss(family):
    model, documents = build(family), some_documents()
    before = losses(model, *documents)
    documents[1] = documents[1].flip(0)
    after = losses(model, *documents)
    assert after[1] != pytest.approx(before[1], rel=1e-3)
    assert [after[i] for i in (0, 2, 3)] == pytest.approx([before[i] for i in (0, 2, 3)], rel=1e-6)
    check_documents_apart(model)


def test_what_the_check_says_is_true():
    """Older versions of transformers hand no positions to the masks of this architecture."""
    model, documents = build("olmoe"), some_documents()
    before = losses(model, *documents)
    documents[1] = documents[1].flip(0)
    after = losses(model, *documents)
    if after[2] == pytest.approx(before[2], rel=1e-6):
        check_documents_apart(model)
    else:
        with pytest.raises(UnsupportedModel, match="'olmoe' lets packed documents see each other"):
            check_documents_apart(model)


def test_an_architecture_that_mixes_neighbours_is_refused():
    config = transformers.Lfm2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with pytest.raises(UnsupportedModel, match="'lfm2' lets packed documents see each other"):
        check_documents_apart(model)


def test_a_soft_cap_is_not_left_out():
    config = make_config("gemma2")
    assert choose_attention("auto", CPU, config, 64, 1) == "eager"
    with pytest.raises(UsageError, match="soft cap"):
        choose_attention("sdpa", CPU, config, 64, 1)


@pytest.mark.parametrize("wanted", ["flex", "flash"])
def test_a_kernel_that_the_device_lacks_is_refused(wanted):
    with pytest.raises(UsageError, match=f"--attention {wanted} needs a CUDA device"):
        choose_attention(wanted, CPU, make_config("llama"), 64, 1)


def test_a_long_map_is_warned_of(caplog):
    assert choose_attention("auto", CPU, make_config("llama"), 32_768, 1) == "sdpa"
    assert "map of 32768 × 32768" in caplog.text


@on_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_on_a_gpu_documents_are_kept_apart_in_blocks(family):
    config = make_config(family)
    device = torch.device("cuda")
    assert choose_attention("auto", device, config, 32_768, 1) == FLEX
    expected = losses(build(family), *some_documents())
    assert losses(build(family, FLEX, device), *some_documents()) == pytest.approx(expected, rel=2e-3)


@on_gpu
def test_on_a_gpu_a_window_of_32k_needs_no_map():
    """A map of 32,768² booleans alone has 1 GiB."""
    model = build("llama", FLEX, torch.device("cuda")).to(torch.bfloat16)
    document = torch.randint(VOCABULARY, (16_384,))
    losses(model, document, document)  # compiles
    torch.cuda.reset_peak_memory_stats()
    losses(model, document, document)
    assert torch.cuda.max_memory_allocated() < 400 << 20
