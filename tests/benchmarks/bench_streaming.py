"""Factorize a 7B-shaped bf16 checkpoint: peak memory, and time against copying the same files.

    python tests/benchmarks/bench_streaming.py --directory /big/disk

Needs about 40 GB of free disk for the default shape (source, copy, result). The weights are random: with weights-only
strategies their values do not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from reporting import header, report_path, write_report
from safetensors.torch import save_file
from transformers import LlamaConfig

PEAK_RSS_BAR = 3e9
COPY_RATIO_BAR = 4.0


def write_source(directory: Path, layers: int) -> int:
    """A Llama-2-7B-shaped checkpoint in bf16, one shard per layer; returns its bytes."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config.to_json_string())
    d, f = config.hidden_size, config.intermediate_size
    attention = {f"self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
    ffn = {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
    norms = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    head = {"model.embed_tokens.weight": (32000, d), "model.norm.weight": (d,), "lm_head.weight": (32000, d)}
    shards = [{f"model.layers.{layer}.{n}": s for n, s in (attention | ffn | norms).items()} for layer in range(layers)]
    weight_map, total = {}, 0
    for index, shapes in enumerate([*shards, head]):
        name = f"model-{index + 1:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {key: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for key, shape in shapes.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def timed_copy(source: Path, target: Path) -> float:
    """Seconds to copy the files and bring them to disk, as factorize does."""
    started = time.monotonic()
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def timed_factorize(source: Path, out: Path, strategy: str) -> dict[str, object]:
    """The command's own JSON result, from a process of its own so that peak memory is its alone."""
    command = [sys.executable, "-m", "factorctl", "factorize", str(source), "--experts", "8", "--strategy", strategy]
    command += ["--router", "random", "--out", str(out), "--format", "json", "--quiet"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(out)
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="an empty directory on a big disk")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--strategy", default="contiguous")
    parser.add_argument("--rounds", type=int, default=2, help="copy and factorize are timed alternately this often")
    args = parser.parse_args()

    source = args.directory / "source"
    total = write_source(source, args.layers)
    rows = []
    for number in range(args.rounds):
        copy_seconds = timed_copy(source, args.directory / "copy")
        result = timed_factorize(source, args.directory / "out", args.strategy)
        rows.append(
            (number + 1, copy_seconds, result["seconds"], result["seconds"] / copy_seconds, result["peak_rss_bytes"])
        )
    shutil.rmtree(source)

    ratio, peak = max(row[3] for row in rows), max(row[4] for row in rows)
    table = "\n".join(
        f"| {n} | {copy:.1f} | {own:.1f} | {share:.2f} | {rss / 1e9:.2f} |" for n, copy, own, share, rss in rows
    )
    write_report(
        report_path("streaming"),
        f"""{header("Streaming factorization of a 7B-shaped checkpoint")}
A Llama-2-7B-shaped bf16 checkpoint ({args.layers} layers, {total / 1e9:.1f} GB, random weights), factorized with
`--experts 8 --strategy {args.strategy} --router random`. Copying includes bringing the files to disk; factorizing
includes reading, hashing and checking every source file, the identity check of every layer, and fsync.

| round | copy, s | factorize, s | factorize / copy | peak RSS, GB |
|---|---|---|---|---|
{table}

- Peak RSS below 3 GB: {"yes" if peak < PEAK_RSS_BAR else "NO"} ({peak / 1e9:.2f} GB).
- At most 4x the copy: {"yes" if ratio <= COPY_RATIO_BAR else "NO"} ({ratio:.2f}x in the worse round).
""",
    )


if __name__ == "__main__":
    main()
