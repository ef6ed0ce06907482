"""Sizes of batches that nobody has timed on a GPU: training's micro-batch, and what an evaluation takes at once.

    python tests/benchmarks/bench_gpu_constants.py --checkpoint runs/demo-1R8E3K+S384 --text valid.jsonl.xz

Training is timed by `finetune --dry-run`'s own steps. `MICRO_TOKENS` (factorctl/training/batches.py) and `BATCH_TOKENS`
(factorctl/evaluation/perplexity.py) are what ships.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from bench_gpu_latency import Sayer, attempt, shown
from bench_model_latency import numbers
from transformers import PreTrainedModel

from factorctl.checkpoint.manifest import is_artefact
from factorctl.config.evaluate import EvalConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.evaluation import perplexity
from factorctl.models.loading import load, open_checkpoint
from factorctl.pipeline.common.devices import torch_device
from factorctl.pipeline.common.tokenizers import load_tokenizer
from factorctl.pipeline.evaluate.texts import read_text
from factorctl.pipeline.finetune.run import rehearse
from factorctl.progress import SilentProgress
from factorctl.training.batches import MICRO_TOKENS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="or a directory of some, for the first that routes"
    )
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--micro-tokens", default="2048,4096,8192,16384,32768,65536")
    parser.add_argument("--block-length", type=int, default=1024)
    parser.add_argument("--batch-tokens", default="1024,4096,16384,65536", help="of an evaluation")
    parser.add_argument("--evaluated-tokens", type=int, default=131_072)
    parser.add_argument("--compile", action="store_true", help="also time compiled training")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not is_artefact(arguments.checkpoint):
        made = [directory for directory in sorted(arguments.checkpoint.iterdir()) if is_artefact(directory)]
        arguments.checkpoint = next(one for one in made if open_checkpoint(one).spec.shape.top_k)
    say = Sayer(arguments.out)
    evaluation_table(arguments, say)
    training_table(arguments, say)
    return 0


def training_table(arguments: argparse.Namespace, say: Sayer) -> None:
    say(f"Training, blocks of {arguments.block_length}; ships as {MICRO_TOKENS}.", "",
        "| micro-batch tokens | compiled | tokens/s | peak GB |", "|---:|---|---:|---:|")  # fmt: skip
    for compiles in (False, True) if arguments.compile else (False,):
        for tokens in numbers(arguments.micro_tokens):
            config = FinetuneConfig(
                checkpoint=arguments.checkpoint, tokens=tokens, batch_tokens=tokens, device=arguments.device,
                block_length=arguments.block_length, micro_batch=tokens // arguments.block_length,
                compile=compiles, out=arguments.checkpoint.with_name("never-written"), data=arguments.text,
            )  # fmt: skip
            peak: list[float] = []
            speed = shown(attempt(training_speed, config, peak))
            say(f"| {tokens} | {'yes' if compiles else 'no'} | {speed} | {''.join(f'{size:.1f}' for size in peak)} |")
    say("")


def training_speed(config: FinetuneConfig, peak: list[float]) -> float:
    """Tokens/s of the fastest of a few steps; `peak` gets the gigabytes."""
    found = rehearse(config, SilentProgress())
    peak.append(found.peak_memory_bytes / 1e9)
    return found.tokens_per_second


def evaluation_table(arguments: argparse.Namespace, say: Sayer) -> None:
    device = torch_device(arguments.device)
    tokenizer = load_tokenizer(arguments.checkpoint, hint="")
    config = EvalConfig(data_tokens=arguments.evaluated_tokens, document_tokens=1024)
    documents = read_text("text", arguments.text, config, tokenizer, SilentProgress()).documents
    say(f"Perplexity, windows of 1024; ships as {perplexity.BATCH_TOKENS} at once.", "",
        "| dtype | tokens at once | tokens/s | perplexity |", "|---|---:|---:|---:|")  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        model = load(arguments.checkpoint, dtype=dtype, device=device, verify=False)
        attempt(evaluation_speed, model, documents, [])  # what is made once is made
        for tokens in numbers(arguments.batch_tokens):
            perplexity.BATCH_TOKENS = tokens
            found: list[float] = []
            speed = shown(attempt(evaluation_speed, model, documents, found))
            say(f"| {str(dtype)[6:]} | {tokens} | {speed} | {''.join(f'{value:.4f}' for value in found)} |")
        del model
    say("")


def evaluation_speed(model: PreTrainedModel, documents: list[perplexity.TextDocument], found: list[float]) -> float:
    """Tokens/s; `found` gets the perplexity."""
    started = time.perf_counter()
    score = perplexity.score_text(model, documents, window=1024, stride=512, progress=SilentProgress())
    found.append(score.perplexity)
    return score.tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
