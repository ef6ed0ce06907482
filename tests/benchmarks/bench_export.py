"""Whether exports of a real model continue prompts as the native model does: stock transformers and llama.cpp.

    python tests/benchmarks/bench_export.py runs/demo-1R4E2K

Exports the checkpoint to hf and gguf (f32), continues the same prompts greedily for 64 tokens in all three, and prints
a Markdown report, written to docs/benchmarks/<date>-export-<name>-<cpu>.md. Where a continuation differs, the report
says at which token, and how far apart the native model's two best logits were there: a tie is no fault.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from reporting import report_path, write_report
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import factorctl
from factorctl.config.export import ExportConfig, ExportTarget
from factorctl.exporting.check.llama_cpp import ask_llama_cpp
from factorctl.exporting.check.native import plain
from factorctl.exporting.check.stock import StockJob, ask_stock
from factorctl.exporting.check.stock_process import greedy
from factorctl.pipeline.export.run import ExportResult, export
from factorctl.processor import processor_name
from factorctl.progress import SilentProgress

LIBRARIES = ("factorctl", "torch", "transformers", "gguf", "xllamacpp")
NEW_TOKENS = 64
TIE = 1e-3
"""Logits nearer than this are called tied."""
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "My favourite season is autumn, because",
    "The three primary colours are",
)


@dataclass(frozen=True)
class Continuation:
    """One prompt in one engine, against the native model."""

    prompt: str
    equal: int
    """Tokens before the first difference."""
    gap: float | None
    """Difference of the native model's two best logits at the first difference; None where there is none."""

    @property
    def verdict(self) -> str:
        if self.gap is None:
            return f"all {self.equal} equal"
        kind = "a tie" if self.gap < TIE else "no tie"
        return f"{self.equal} equal, then {kind}: the two best logits are {self.gap:.1e} apart"


def continued(
    model: torch.nn.Module, prompts: Sequence[list[int]], ours: Sequence[list[int]], theirs: Sequence[list[int]]
) -> list[Continuation]:
    """Compare greedy continuations token by token."""
    found = []
    for text, prompt, a, b in zip(PROMPTS, prompts, ours, theirs, strict=True):
        equal = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        gap = None
        if equal < len(a):
            with torch.no_grad():
                best = model(torch.tensor([prompt + a[:equal]])).logits[0, -1].topk(2).values
            gap = float(best[0] - best[1])
        found.append(Continuation(text, equal, gap))
    return found


def rows(continuations: Sequence[Continuation]) -> list[str]:
    return [f"| {c.prompt.splitlines()[0]} | {c.verdict} |" for c in continuations]


def figures(result: ExportResult) -> str:
    return (
        f"| {result.format} | {result.architecture} | {result.engine} | {result.tokens_compared} | "
        f"{result.max_logit_error:.2g} | {result.top1_agreement:.2%} | {result.kl:.2g} | "
        f"{result.scale_rounding:g} | {result.bytes / 1e9:.2f} |"
    )


def report(checkpoint: Path, scratch: Path) -> str:
    targets: tuple[ExportTarget, ...] = ("hf", "gguf")
    results = [
        export(ExportConfig(checkpoint=checkpoint, target=target, out=scratch / target), SilentProgress())
        for target in targets
    ]
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [[int(token) for token in tokenizer(prompt)["input_ids"]] for prompt in PROMPTS]
    model: Any = factorctl.load(checkpoint, verify=False)
    native = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    stock_job = StockJob(scratch / "hf", "float32", plain(prompts[:1]), prompts=prompts, new_tokens=NEW_TOKENS)
    (stock,) = ask_stock([stock_job])
    llama = ask_llama_cpp(
        scratch / "gguf" / "model.gguf", [], vocab_size=64, prompts=prompts, new_tokens=NEW_TOKENS
    ).continuations
    text = [
        f"# Exports of {results[0].notation}, {datetime.date.today()}",
        "",
        f"- CPU: {processor_name()}, {os.cpu_count()} cores",
        f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        f"- Command: `python tests/benchmarks/bench_export.py {checkpoint.name}`",
        "",
        "## Logits against the native checkpoint",
        "",
        "Text in the public domain; for llama.cpp the error is that of the 8 largest log-probabilities.",
        "",
        "| to | architecture | engine | tokens | largest error | top-1 | KL, nats | scale rounding | GB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
        *map(figures, results),
        "",
        f"## The same greedy text for {NEW_TOKENS} tokens",
        "",
    ]
    for engine, answers in (("transformers", stock.continuations), ("llama.cpp", llama)):
        text += [f"| prompt | {engine} against native |", "|---|---|"]
        text += [*rows(continued(model, prompts, native, answers)), ""]
    text += ["## What the native model writes", ""]
    for prompt, tokens in zip(PROMPTS, native, strict=True):
        text += [f"- {prompt!r}: {tokenizer.decode(tokens)!r}"]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", help="part of the report's file name; default: the checkpoint's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-export-") as scratch:
        text = report(arguments.checkpoint, Path(scratch))
    write_report(report_path(f"export-{arguments.name or arguments.checkpoint.name.lower()}"), text)


if __name__ == "__main__":
    main()
