"""How fast and how exact are the attention measures, next to what they cannot do without?

    python benchmarks/attention_kernels.py                  all layers at 32,768 tokens
    python benchmarks/attention_kernels.py --quick          tiny sizes: does it run?
    python benchmarks/attention_kernels.py --model FOLDER   errors on this model's queries and keys too

For each layer: `far_statistics` (LongAttn) or `span_focus` (LADM; its published strides, and every span) in time and
in FLOP/s of the products that the measure needs (of queries and keys, in attention also those with the values).
Beside them, in the same run: the floors, which are the time of these products at the rate of a large matrix product,
and of one exponential for each pair at the rate of a kernel of nothing but exponentials; PyTorch's causal attention of
that layer; and the published way (see published.py), of the layer's statistics alone and of a whole window.

The errors are relative, against float64 by blocks of queries, for a few heads: of every head's strength and variance,
of the CDS that LADM makes of the spans. On random queries and keys, and on a model's own on real text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longsift.attention import attention_and_focus, far_statistics, span_focus
from longsift.calculators import LayerAttention
from longsift.calculators.first_layer import FirstLayer
from longsift.calculators.full import FullModel
from longsift.methods.ladm import Ladm
from longsift.methods.longattn import far_distance
from longsift.pieces import load_tokenizer
from longsift.scoring import resolve_device
from measuring import Timing, exponential_rate, input_sets, matmul_rate, parser, peak_bytes, table, time_calls, write
from published import SPAN, far_mask, ladm_dependency, ladm_layer, longattn_layer, published
from shapes import LAYERS, Layer, library_documents, model_config, random_windows

LENGTH, ODD, QUICK = 32_768, 32_765, 2_560
CHECKED_HEADS = 4
SAMPLED = 8  # one query of so many, in sampled statistics
EXACT_ROWS = 512  # queries of a float64 block

FOR_LADM = ("tinyllama", "smollm2")  # layers of small models; LongAttn's are those of large ones
ALSO = ("longattn-8b", "tinyllama")  # measured at an odd length and in float16 too

STRIDES = {"published strides": Ladm(), "dense": Ladm(dense=True)}


def query_spans(strides: str, length: int) -> Sequence[int]:
    """The query spans that LADM measures; every one of the window when dense."""
    return range(length // SPAN) if strides == "dense" else STRIDES[strides].query_spans(length)


def visible_pairs(length: int, spans: Sequence[int], denominator: str) -> int:
    """Query-key pairs of a head in the softmaxes of these query spans."""
    before = sum(SPAN * (length % SPAN + j * SPAN) for j in spans)
    return before + (len(spans) * SPAN * (SPAN + 1) // 2 if denominator == "causal" else 0)


def kernel_rows(
    name: str, layer: Layer, length: int, dtype: torch.dtype, device: torch.device, rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Time every measure of a layer."""
    sets = input_sets(lambda seed: layer.queries_keys(length, seed, device, dtype), device)
    # One query of every SAMPLED consecutive ones
    rows = torch.arange(0, length, SAMPLED, device=device)
    sampled = [(q[:, :, ::SAMPLED].contiguous(), k) for q, k in sets]
    distance = far_distance(length)

    def row(measure: str, call: Any, pairs: int, products: int = 1) -> dict[str, Any]:
        timing = time_calls(call, device)
        flop, exponentials = 2 * products * layer.head_dim * pairs * layer.heads, pairs * layer.heads
        return {
            "layer": name,
            "measure": measure,
            "length": length,
            "dtype": str(dtype).removeprefix("torch."),
            **asdict(timing),
            "tflop_per_s": flop / (timing.ms * 1e-3) / 1e12,
            "products_floor_ms": flop / rates[str(dtype)] * 1e3,
            "exponentials_floor_ms": exponentials / rates["exponentials"] * 1e3,
        }

    every = length * (length + 1) // 2
    yield row("far statistics", lambda turn: far_statistics(*sets[turn % len(sets)], distance), every)
    if name not in FOR_LADM:
        yield row(
            f"far statistics, 1/{SAMPLED} of the queries",
            lambda turn: far_statistics(*sampled[turn % len(sets)], distance, rows=rows),
            int((rows + 1).sum()),
        )
    for strides in STRIDES if name in FOR_LADM else ():
        spans = query_spans(strides, length)
        for denominator in ("prior", "causal"):
            yield row(
                f"span focus, {strides}, {denominator}",
                lambda turn, spans=spans, denominator=denominator: span_focus(
                    *sets[turn % len(sets)], SPAN, denominator=denominator, query_spans=spans, average_heads=True
                ),
                visible_pairs(length, spans, denominator),
            )
    values = [torch.randn_like(k) for _, k in sets]
    for denominator in ("prior", "causal") if name in FOR_LADM else ():
        yield row(
            f"attention and dense span focus in one pass, {denominator}",
            lambda turn, denominator=denominator: attention_and_focus(
                *sets[turn % len(sets)],
                values[turn % len(sets)],
                SPAN,
                scale=layer.head_dim**-0.5,
                denominator=denominator,
                average_heads=True,
            ),
            every,
            products=2,
        )
    yield row(
        "causal attention (PyTorch SDPA)",
        lambda turn: scaled_dot_product_attention(
            *sets[turn % len(sets)], values[turn % len(sets)], is_causal=True, enable_gqa=True
        ),
        every,
        products=2,
    )


def published_statistics(
    name: str, layer: Layer, length: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Time LADM's published statistics of one layer, without the rest of the model."""
    (q, k), scale = layer.queries_keys(length, 0, device, dtype), layer.head_dim**-0.5
    keys = k.repeat_interleave(layer.heads // layer.kv_heads, 1)
    timing = time_calls(lambda _: ladm_dependency(q, keys, scale), device, warm_up=1, least=2, most=4)
    about = {"layer": name, "measure": "published LADM statistics", "length": length}
    return about | {"dtype": str(dtype).removeprefix("torch."), **asdict(timing)}


def published_windows(length: int, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Time the published way of a whole window, from ids to its measures."""
    cases = [
        ("LongAttn, Llama-3.1-8B", "longattn", longattn_layer, "llama-3.1-8b", {"num_hidden_layers": 1}, 1),
        ("LongAttn, Llama-3.1-70B", "longattn", longattn_layer, "llama-3.1-70b", {"num_hidden_layers": 1}, 1),
        ("LADM, TinyLlama-1.1B", "ladm", ladm_layer, "tinyllama-1.1b", {}, 1),
        ("LADM, TinyLlama-1.1B, a batch of 4", "ladm", ladm_layer, "tinyllama-1.1b", {}, 4),
    ]
    mask = time_calls(lambda _: far_mask(length, device), device, warm_up=1, least=1, most=1)
    for title, method, layer, model, changes, batch in cases:
        config = model_config(model, quick=quick, **changes)
        ids = torch.from_numpy(np.stack(random_windows(batch, length, config.vocab_size))).to(device)
        yield {
            "case": title,
            "length": length,
            "batch": batch,
            "mask_ms": mask.ms if method == "longattn" else None,
            **_published_window(published(method, layer, config, device), ids, device),
        }


def _published_window(measure: Callable[[Tensor], Tensor], ids: Tensor, device: torch.device) -> dict[str, Any]:
    """Milliseconds of one window of a batch, and the peak memory of the batch."""
    timings: list[Timing] = []
    peak = peak_bytes(
        lambda: timings.append(time_calls(lambda _: measure(ids), device, warm_up=1, least=2, most=4)), device
    )
    times = {key: value / len(ids) if key.endswith("ms") else value for key, value in asdict(timings[0]).items()}
    return {**times, "peak_bytes": peak}


def exact_far(q: Tensor, k: Tensor, distance: int, scale: float) -> tuple[Tensor, Tensor]:
    """Strength and variance of heads (heads, length, head_dim), in float64, by blocks of queries."""
    length = q.shape[1]
    key = torch.arange(length, device=q.device)
    total = torch.zeros(q.shape[0], dtype=torch.float64, device=q.device)
    squares = torch.zeros_like(total)
    for start in range(0, length, EXACT_ROWS):
        query = key[start : start + EXACT_ROWS, None]
        for head in range(q.shape[0]):
            logits = q[head, start : start + EXACT_ROWS].double() @ k[head].double().T * scale
            p = logits.masked_fill_(key > query, -math.inf).softmax(-1).masked_fill_(query - key < distance, 0.0)
            total[head] += p.sum()
            squares[head] += p.square_().sum()
    entries = length * length
    return total / length, (squares - total.square() / entries) / (entries - 1)


def exact_focus(q: Tensor, k: Tensor, spans: Sequence[int], denominator: str, scale: float) -> Tensor:
    """Mass (query spans, spans), mean over heads, in float64; q and k (heads, length, head_dim)."""
    heads, length, _ = q.shape
    lead, number = length % SPAN, length // SPAN
    key = torch.arange(length, device=q.device)
    focus = torch.zeros(len(spans), number, dtype=torch.float64, device=q.device)
    for i, j in enumerate(spans):
        start = lead + j * SPAN
        end = start if denominator == "prior" else start + SPAN
        if end == 0:
            continue
        query = key[start : start + SPAN, None]
        for head in range(heads):
            logits = q[head, start : start + SPAN].double() @ k[head, :end].double().T * scale
            if denominator == "causal":
                logits.masked_fill_(key[:end] > query, -math.inf)
            mass = logits.softmax(-1).sum(0)[lead:]
            focus[i, : mass.numel() // SPAN] += mass.view(-1, SPAN).sum(1)
    return focus / heads


def errors(layer: LayerAttention, *, spans: bool) -> dict[str, float]:
    """Largest relative errors of a layer's measures: of each checked head's strength and variance, of the CDS."""
    q, k, length = layer.q, layer.k, layer.q.shape[2]
    group = q.shape[1] // k.shape[1]
    heads = sorted({i * (q.shape[1] - 1) // max(1, CHECKED_HEADS - 1) for i in range(CHECKED_HEADS)})
    some = q[0, heads], k[0, [head // group for head in heads]]
    distance = far_distance(length)
    far = far_statistics(q, k, distance, scale=layer.scale)
    strength, variance = exact_far(*some, distance, layer.scale)
    found = {
        "strength": _largest(far.strength[0, heads], strength),
        "variance": _largest(far.variance[0, heads], variance),
    }
    for strides, ladm in STRIDES.items() if spans else ():
        chosen = ladm.query_spans(length)
        for denominator in ("prior", "causal"):
            how = {"scale": layer.scale, "denominator": denominator, "query_spans": chosen}
            measured = {f"CDS, {strides}, {denominator}": span_focus(q, k, SPAN, **how)}
            if strides == "dense":
                one_pass = attention_and_focus(q, k, torch.randn_like(k), SPAN, **how)[1]
                measured[f"CDS, {strides}, {denominator}, in one pass"] = one_pass
            exact = ladm.contextual_dependency(exact_focus(*some, chosen, denominator, layer.scale), length)
            for name, focus in measured.items():
                ours = ladm.contextual_dependency(focus[0, heads].double().mean(0), length)
                found[name] = _largest(ours, exact)
    return found


def _largest(ours: Tensor, exact: Tensor) -> float:
    worst = float(((ours.double() - exact) / exact).abs().max())
    return math.inf if math.isnan(worst) else worst


def model_layers(
    model: str, length: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, LayerAttention]]:
    """Queries and keys of a model's first layer, and of three global layers, on the standard library's sources."""
    text = "".join(document["text"] for document in library_documents(8 * length))
    ids = torch.from_numpy(load_tokenizer(model, None, False).encode([text])[0].ids[:length].astype("int64"))[None]
    first = FirstLayer.load(model, device=device, dtype=dtype)
    with torch.inference_mode():
        yield "first layer", first.queries_keys(ids.to(device))
    whole = FullModel.load(model, device=device, dtype=dtype)
    chosen = whole.global_layers(length)
    for layer in sorted({chosen[0], chosen[len(chosen) // 2], chosen[-1]}):
        with torch.inference_mode():
            kept = whole.reduce(ids.to(device), _copied, layers=(layer,))
        yield f"layer {layer}", kept[layer]


def _copied(seen: LayerAttention) -> LayerAttention:
    return LayerAttention(seen.layer, seen.q.clone(), seen.k.clone(), seen.scale, seen.softcap)


def cases(name: str, length: int, dtypes: Sequence[torch.dtype]) -> list[tuple[int, torch.dtype]]:
    """The lengths and types that a layer is measured at; few, since each is a kernel to compile."""
    return [(length, dtypes[0])] + (
        [(length - LENGTH + ODD, dtypes[0]), *((length, dtype) for dtype in dtypes[1:])] if name in ALSO else []
    )


def error_rows(
    layers: Sequence[str], models: Sequence[str], length: int, dtypes: Sequence[torch.dtype], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Errors on random queries and keys of the layer shapes, and on the models' own."""
    for name in layers:
        for tokens, dtype in cases(name, length, dtypes):
            q, k = LAYERS[name].queries_keys(tokens, 7, device, dtype)
            layer = LayerAttention(0, q, k, LAYERS[name].head_dim ** -0.5, None)
            found = errors(layer, spans=name in FOR_LADM)
            yield {"inputs": f"random, {name}", "length": tokens, "dtype": str(dtype)[6:], "errors": found}
    for model in models:
        for title, layer in model_layers(model, length, device, dtypes[0]):
            found = errors(layer, spans=True)
            yield {
                "inputs": f"{Path(model).name}, {title}",
                "length": length,
                "dtype": str(dtypes[0])[6:],
                "errors": found,
            }


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--layer", choices=[*LAYERS], action="append", help="only this one; may be repeated")
    flags.add_argument("--length", type=int, default=None, help="tokens of the window")
    flags.add_argument("--model", action="append", default=None, help="models whose own queries and keys are checked")
    flags.add_argument("--no-published", action="store_true", help="leave out the published way, which takes long")
    args = flags.parse_args(arguments)
    device = resolve_device(args.device)
    length = args.length or (QUICK if args.quick else LENGTH)
    layers = args.layer or list(LAYERS)
    dtypes = [torch.bfloat16, torch.float16] if device.type == "cuda" else [torch.float32]
    rates = {str(dtype): matmul_rate(device, dtype, 512 if args.quick else 8192) for dtype in dtypes}
    rates["exponentials"] = exponential_rate(device)
    print("rates: " + ", ".join(f"{name} {rate / 1e12:.4g} T/s" for name, rate in rates.items()), flush=True)

    kernels: list[dict[str, Any]] = []
    for name in layers:
        for tokens, dtype in cases(name, length, dtypes):
            kernels += kernel_rows(name, LAYERS[name], tokens, dtype, device, rates)
        if name in FOR_LADM and not args.no_published:
            kernels.append(published_statistics(name, LAYERS[name], length, dtypes[-1], device))
    print("\n" + kernel_table(kernels), flush=True)
    whole = [] if args.no_published else list(published_windows(length, device, args.quick))
    if whole:
        print("\n" + published_table(whole), flush=True)
    found = list(error_rows(layers, args.model or ["embedded"], length, dtypes, device))
    print("\n" + error_table(found), flush=True)
    write(args.out, device, {"rates": rates, "kernels": kernels, "published": whole, "errors": found})


def kernel_table(rows: Sequence[dict[str, Any]]) -> str:
    """Times, rates and floors of the measures."""
    headers = (
        "layer",
        "measure",
        "tokens",
        "dtype",
        "ms",
        "least–largest",
        "TFLOP/s",
        "products ms",
        "exponentials ms",
    )
    floors = ("tflop_per_s", "products_floor_ms", "exponentials_floor_ms")
    cells = [
        (row["layer"], row["measure"], row["length"], row["dtype"], row["ms"], _spread(row), *map(row.get, floors))
        for row in rows
    ]
    return table(headers, cells)


def published_table(rows: Sequence[dict[str, Any]]) -> str:
    """Times and memory of the published way."""
    headers = (
        "the published way, one window",
        "tokens",
        "ms",
        "least–largest",
        "of it the mask on the host ms",
        "peak GiB",
    )
    cells = [
        (
            row["case"],
            row["length"],
            row["ms"],
            _spread(row),
            row["mask_ms"],
            None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30,
        )
        for row in rows
    ]
    return table(headers, cells)


def error_table(rows: Sequence[dict[str, Any]]) -> str:
    """Relative errors against float64."""
    names = list(dict.fromkeys(name for row in rows for name in row["errors"]))
    cells = [(row["inputs"], row["length"], row["dtype"], *map(row["errors"].get, names)) for row in rows]
    return table(("relative error on", "tokens", "dtype", *names), cells)


def _spread(row: dict[str, Any]) -> str:
    return f"{row['low_ms']:.3g}–{row['high_ms']:.3g}"


if __name__ == "__main__":
    main()
