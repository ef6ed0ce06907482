"""FFN layers and a whole model on a GPU, replayed as CUDA graphs: every path at every token count, beside its anchors.

    python tests/benchmarks/bench_gpu_latency.py ffn --out ffn.md
    python tests/benchmarks/bench_gpu_latency.py model --out model.md

`ffn` says from how many tokens on which path is fastest, which is what the constants of `slot` and `grouped`
in factorctl/ffn/choice.py stand for. One graph runs over more layers than the L2 cache holds. `compiled` rows
are torch.compile's kernels in such a graph, the others eager ones. `model` is TinyLlama's shape with random weights:
prefill as it runs, a decoding step as a graph over a static cache. On a CPU both only show that they run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_ffn import SIZES
from bench_model_latency import INNER, VOCABULARY, WIDTH, numbers, tinyllama
from torch import nn
from transformers import PreTrainedModel, StaticCache

from factorctl.config.shape import FactorShape
from factorctl.ffn.layer import FactoredFFN
from factorctl.profiling.variants import StockFFN, dense_as_wide_as, make_variants, with_all_experts

SPLITS = ((4, 1), (4, 2), (8, 2), (64, 8))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
STREAM_BYTES = 96 << 20
"""Nearly twice the L2 cache of an H100."""
SLOT_BYTES = 4 << 30
"""The most that the weights gathered by an eager `slot` may take."""
REPLAYS, ROUNDS, SPARE = 10, 5, 128
"""Replays of a graph between two events, how often, and cache positions for a decoding graph to write to."""
Call = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ffn", "model"])
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--tokens", default=",".join(str(tokens) for tokens in TOKENS))
    parser.add_argument("--compiled", default="1,8", help="token counts at which torch.compile is timed too")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512, help="tokens before a decoding step")
    parser.add_argument("--top-k", default="1,2")
    parser.add_argument("--width", type=int, default=WIDTH, help="other than TinyLlama's, to see that all of this runs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    say = Sayer(arguments.out)
    name = torch.cuda.get_device_name() if arguments.device.type == "cuda" else "a CPU, which times nothing of use"
    say(f"{arguments.what} in bfloat16 on {name}, torch {torch.__version__}.", "")
    return (ffn_tables if arguments.what == "ffn" else model_table)(arguments, say)


class Sayer:
    """Prints lines and keeps them in a file at once: the run may be cut off."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def __call__(self, *lines: str) -> None:
        print("\n".join(lines), flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write("\n".join(lines) + "\n")


def ffn_tables(arguments: argparse.Namespace, say: Sayer) -> int:
    """A table of eager paths for each model's layer, then one of compiled layers."""
    counts = numbers(arguments.tokens)
    for model in arguments.models.split(","):
        say(f"{model}: microseconds per layer; shipped is what `auto` takes, gain is dense / shipped.", "",
            "| split | tokens | shipped | slot | masked | grouped | dense | narrow | stock | fastest | gain |",
            "|---|---:|---|---:|---:|---:|---:|---:|---:|---|---:|")  # fmt: skip
        for split in SPLITS:
            for line in ffn_rows(SIZES[model], split, counts, arguments.device):
                say(line)
        say("")
    say("Compiled, microseconds per layer:", "",
        "| model | split | tokens | slot | masked | dense |", "|---|---|---:|---:|---:|---:|")  # fmt: skip
    largest = arguments.models.split(",")[-1]
    for split in SPLITS[:2]:
        for tokens in numbers(arguments.compiled) if arguments.compiled else []:
            say(compiled_row(largest, split, tokens, arguments.device))
    return 0


def make_layers(size: tuple[int, int], split: tuple[int, int], device: torch.device) -> list[FactoredFFN]:
    """Enough layers to stream from memory; on a CPU two."""
    (width, inner), (n, k) = size, split
    count = max(2, STREAM_BYTES // (3 * width * inner * 2)) if device.type == "cuda" else 2
    layers = []
    for _ in range(count):
        ffn = FactoredFFN(FactorShape(n, k, inner // n, 0), width, "silu", dtype=torch.bfloat16, device=device)
        for parameter in ffn.requires_grad_(False).parameters():
            nn.init.normal_(parameter, std=0.02)
        layers.append(ffn)
    return layers


def ffn_rows(size: tuple[int, int], split: tuple[int, int], counts: list[int], device: torch.device) -> Iterator[str]:
    layers = make_layers(size, split, device)
    stock = [StockFFN(ffn) for ffn in layers]
    anchors = {
        "dense": [with_all_experts(ffn, plain.dense.down_DF) for ffn, plain in zip(layers, stock, strict=True)],
        "narrow": [dense_as_wide_as(ffn, split[1]) for ffn in layers],
        "stock": stock,
    }
    expert_bytes = 3 * size[0] * (size[1] // split[0]) * 2
    for tokens in counts:
        x_TD = torch.randn(tokens, size[0], dtype=torch.bfloat16, device=device)
        shipped = layers[0].path_for(tokens)
        times: dict[str, float | str] = {}
        for path in ("slot", "masked", "grouped"):
            too_much = path == "slot" and tokens * split[1] * expert_bytes > SLOT_BYTES
            times[path] = "" if too_much else attempt(on_path, layers, path, x_TD)
        for name, anchor in anchors.items():
            times[name] = attempt(per_layer, anchor, x_TD)
        found = {path: us for path in ("slot", "masked", "grouped") if isinstance(us := times[path], float)}
        fastest = min(found, key=lambda path: found[path]) if found else ""
        dense, ours = times["dense"], times.get(shipped, "")
        ratio = f"{dense / ours:.2f}" if isinstance(dense, float) and isinstance(ours, float) else ""
        cells = [shown(times[name]) for name in ("slot", "masked", "grouped", "dense", "narrow", "stock")]
        yield f"| {layers[0].shape.notation} | {tokens} | {shipped} | {' | '.join(cells)} | {fastest} | {ratio} |"


def on_path(layers: list[FactoredFFN], path: str, x_TD: torch.Tensor) -> float:
    for ffn in layers:
        ffn.path = path  # type: ignore[assignment]
    try:
        return per_layer(layers, x_TD)
    finally:
        for ffn in layers:
            ffn.path = "auto"


def per_layer(layers: list[nn.Module] | list[FactoredFFN], x_TD: torch.Tensor) -> float:
    """Microseconds of one of `layers`, all run one after the other on the same input."""

    def run() -> None:
        for layer in layers:
            layer(x_TD)

    return timed(run, x_TD.device) / len(layers)


def compiled_row(model: str, split: tuple[int, int], tokens: int, device: torch.device) -> str:
    cells = []
    for path in ("slot", "masked", "dense"):
        layers = make_layers(SIZES[model], split, device)
        if path == "dense":
            layers = [with_all_experts(ffn, ffn.down.detach()) for ffn in layers]
        else:
            for ffn in layers:
                ffn.path = path  # type: ignore[assignment]
        x_TD = torch.randn(tokens, SIZES[model][0], dtype=torch.bfloat16, device=device)
        cells.append(shown(attempt(compiled_layers, layers, x_TD)))
    return f"| {model} | 1R{split[0]}E{split[1]}K | {tokens} | {' | '.join(cells)} |"


def compiled_layers(layers: list[FactoredFFN], x_TD: torch.Tensor) -> float:
    torch._dynamo.reset()
    options = {"triton.cudagraphs": False, "coordinate_descent_tuning": True}
    for layer in layers:  # one graph for all of them: weights are its inputs
        layer.compile(fullgraph=True, dynamic=False, options=options)
    return per_layer(layers, x_TD)


def model_table(arguments: argparse.Namespace, say: Sayer) -> int:
    say(f"TinyLlama's shape, {arguments.layers} layers: prefill of {arguments.prompt} tokens, and a decoding step "
        f"behind {arguments.context} tokens as a CUDA graph of eager kernels; milliseconds.", "",
        "| split | phase | batch | path | model | dense | narrow | stock | dense / model | stock / model |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for top_k in numbers(arguments.top_k):
        shape = FactorShape(4, top_k, INNER // 4, 0)
        model = tinyllama(shape, arguments.layers, torch.bfloat16, arguments.device, arguments.width)
        variants = make_variants(model)
        ffn: FactoredFFN = model.model.layers[0].mlp
        for batch in numbers(arguments.batch):
            times = {name: attempt(decoding, variant, batch, arguments) for name, variant in variants.items()}
            say(model_row(shape, "decode", batch, ffn.path_for(batch), times))
        ids_BP = torch.randint(VOCABULARY, (1, arguments.prompt), device=arguments.device)
        times = {name: attempt(prefill, variant, ids_BP) for name, variant in variants.items()}
        say(model_row(shape, "prefill", 1, ffn.path_for(arguments.prompt), times))
        del model, variants
    return 0


def model_row(shape: FactorShape, phase: str, batch: int, path: str, times: dict[str, float | str]) -> str:
    milliseconds = {name: us / 1e3 if isinstance(us, float) else us for name, us in times.items()}
    ours = milliseconds["model"]
    ratios = []
    for name in ("dense", "stock"):
        other = milliseconds[name]
        ratios.append(f"{other / ours:.2f}" if isinstance(other, float) and isinstance(ours, float) else "")
    cells = [
        f"{v:.3f}" if isinstance(v := milliseconds[n], float) else v for n in ("model", "dense", "narrow", "stock")
    ]
    return f"| {shape.notation} | {phase} | {batch} | {path} | {' | '.join([*cells, *ratios])} |"


def decoding(model: PreTrainedModel, batch: int, arguments: argparse.Namespace) -> float:
    """Microseconds of a step of `batch` sequences. The cache counts on with every replay, so it is long enough."""
    cache = StaticCache(config=model.config, max_cache_len=arguments.context + SPARE)
    ids_BP = torch.randint(VOCABULARY, (batch, arguments.context), device=arguments.device)
    model(ids_BP, past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids_B1 = torch.randint(VOCABULARY, (batch, 1), device=arguments.device)
    position_ids = torch.full((1, 1), arguments.context, device=arguments.device)

    def step() -> None:
        model(ids_B1, position_ids=position_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return timed(step, arguments.device)


def prefill(model: PreTrainedModel, ids_BP: torch.Tensor) -> float:
    """Microseconds; long enough that launches hide behind the work."""
    return timed(lambda: model(ids_BP, use_cache=False, logits_to_keep=1), ids_BP.device, captured=False, replays=2)


def attempt(measure: Callable[..., float], *arguments: object) -> float | str:
    """What cannot be captured, compiled or held in memory is said in its cell; the others go on."""
    try:
        return measure(*arguments)
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}".replace("|", "/")


def shown(us: float | str) -> str:
    return f"{us:.1f}" if isinstance(us, float) else us


def timed(run: Call, device: torch.device, *, captured: bool = True, replays: int = REPLAYS) -> float:
    """Microseconds of `run`, the median of several rounds of replays."""
    if device.type != "cuda":
        run()
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6
    call = capture(run) if captured else run
    call()
    rounds = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            call()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) * 1e3 / replays)
    return statistics.median(rounds)


def capture(run: Call) -> Call:
    """`run` as a CUDA graph, after three runs that make what is made once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


if __name__ == "__main__":
    sys.exit(main())
