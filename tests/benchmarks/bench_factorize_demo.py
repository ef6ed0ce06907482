"""Factorize the demo model as a user would, in processes of their own, and report exactness, time and memory.

    python tests/benchmarks/bench_factorize_demo.py --calibration notes.jsonl

Without --calibration the text is sampled from the model itself; the sampled blocks are cached, so a second run shows
the time without sampling.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from reporting import header, report_path, write_report

CASES = {
    "4 experts": ["--experts", "4", "--strategy", "clustered"],
    "8 experts, a quarter shared, refit": [
        "--experts", "8", "--strategy", "clustered", "--shared-fraction", "0.25", "--refit",
    ],
}  # fmt: skip


def factorize(options: list[str], out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "factorctl", "factorize", "demo", *options, "--out", str(out)]
    result = subprocess.run([*command, "--format", "json", "--quiet"], check=True, capture_output=True, text=True)
    subprocess.run([sys.executable, "-m", "factorctl", "verify", str(out), "--quiet"], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refit_rows(layers: list[dict[str, Any]]) -> str:
    rows = [
        f"| {index} | {layer['refit']['error_before']:.3f} | {layer['refit']['error_after']:.3f} "
        f"| {layer['refit']['damping']:g} | {'yes' if layer['refit']['kept'] else 'no'} |"
        for index, layer in enumerate(layers)
        if "refit" in layer
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--calibration-tokens", default="16K")
    args = parser.parse_args()

    shared = ["--calibration", args.calibration, "--calibration-tokens", args.calibration_tokens]
    rows, refits = [], ""
    with tempfile.TemporaryDirectory() as directory:
        for index, (title, options) in enumerate(CASES.items()):
            result = factorize([*options, *shared], Path(directory) / str(index))
            rows.append(
                f"| {title} | {result['notation']} | {result['active_ffn_fraction']:.1%} "
                f"| {result['identity_error']:.1e} "
                f"| {result['seconds']:.0f} | {result['peak_rss_bytes'] / 1e9:.2f} |"
            )
            refits = refit_rows(result["layers"]) or refits
    commands = "\n".join(f"    factorctl factorize demo {shlex.join(options)}" for options in CASES.values())
    table = "\n".join(rows)
    write_report(
        report_path("factorize-demo"),
        f"""{header("Factorizing the demo model")}
SmolLM2-135M-Instruct from its Q4_1 GGUF, 30 layers, F = 1536, float32, calibrated on {args.calibration_tokens} tokens:

{commands}

| case | notation | active FFN | identity error | time, s | peak RSS, GB |
|---|---|---|---|---|---|
{table}

The identity error is the largest relative difference of a layer with all experts on to the dense layer, over all
layers, in float32; 1e-5 is allowed. Every checkpoint passed `factorctl verify`.

## Refit, layer by layer

Relative error of each layer's output against its dense FFN, on the eighth of the calibration tokens that the fit did
not see: 8 experts, a quarter of the neurons shared, half of the experts active.

| layer | before | after | damping | kept |
|---|---|---|---|---|
{refits}
""",
    )


if __name__ == "__main__":
    main()
