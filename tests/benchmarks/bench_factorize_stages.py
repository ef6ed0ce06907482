"""Where the time of `factorize` goes, stage by stage, beside one pass of the same tokens through the dense model.

    python tests/benchmarks/bench_factorize_stages.py --calibration train.jsonl.xz

Stages are timed from outside, by wrapping the functions that do them; what is in none of them (reading, tokenising,
proving, writing) is the rest. The dense pass is transformers' own, in the same process, before and after.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from reporting import header, report_path, timed, write_report

from factorctl.calibration import layer_fit
from factorctl.calibration.compressed_stream import CalibrationStream
from factorctl.checkpoint.sources import resolve
from factorctl.cli.render import progress_listener
from factorctl.config.factorize import CALIBRATION_TOKENS, FactorizeConfig
from factorctl.files.cache import cache_directory
from factorctl.models.loading import load_dense
from factorctl.pipeline.factorize import layers
from factorctl.pipeline.factorize.run import factorize
from factorctl.progress import SilentProgress

BLOCK = 1024
STAGES: dict[str, tuple[Any, str]] = {
    "attention, dense FFN, targets": (CalibrationStream, "enter"),
    "what neurons do, for the partition": (CalibrationStream, "statistics"),
    "partition": (layers.LayerFactory, "partition"),
    "router, twice": (layer_fit, "fit_router"),
    "scale": (layer_fit, "fit_scale"),
    "refit, twice": (layer_fit, "refit_down"),
    "on with the factored FFN's output": (CalibrationStream, "leave"),
    "identity, layer by layer": (layers, "check_identity"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS["cpu"])
    parser.add_argument("--experts", type=int, help="the recommended split without")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--shared-fraction", type=float)
    arguments = parser.parse_args()
    spent: dict[str, list[float]] = {}
    for stage, (owner, name) in STAGES.items():
        setattr(owner, name, timed(getattr(owner, name), stage, spent))
    before = dense_pass(arguments.model, arguments.calibration_tokens)
    with tempfile.TemporaryDirectory() as directory:
        made = factorize(
            FactorizeConfig(
                model=arguments.model,
                out=Path(directory, "out"),
                num_experts=arguments.experts,
                top_k=arguments.top_k,
                shared_fraction=arguments.shared_fraction,
                refit=True,
                calibration=arguments.calibration,
                calibration_tokens=arguments.calibration_tokens,
            ),
            progress_listener(quiet=True),
        )
    dense = min(before, dense_pass(arguments.model, arguments.calibration_tokens))
    seconds = Counter({stage: sum(times) for stage, times in spent.items()})
    lines = table(made.notation, made.seconds, seconds, dense, arguments.calibration_tokens)
    write_report(
        report_path("factorize-stages-demo"), header("Where factorize's time goes") + "\n".join(["", *lines, ""])
    )
    return 0


@torch.no_grad()
def dense_pass(model: str, tokens: int) -> float:
    """Seconds that so many tokens need through the dense model's layers, in blocks as long as calibration's."""
    source = resolve(model, revision=None, cache=cache_directory(), progress=SilentProgress())
    dense = load_dense(source.path, dtype=torch.float32)
    body = getattr(dense, dense.base_model_prefix)
    ids_BL = torch.randint(dense.config.vocab_size, (max(1, tokens // BLOCK), min(BLOCK, tokens)))
    started = time.perf_counter()
    for ids_L in ids_BL:
        body(input_ids=ids_L[None], use_cache=False)
    return time.perf_counter() - started


def table(notation: str, total: float, seconds: Counter[str], dense: float, tokens: int) -> Iterator[str]:
    yield f"{notation} with the refit, {tokens:,} calibration tokens, {total:.0f} s in all; the same tokens through the"
    yield f"dense model in torch: {dense:.0f} s."
    yield ""
    yield "| stage | seconds | of the dense pass |"
    yield "|---|---:|---:|"
    for stage in STAGES:
        yield f"| {stage} | {seconds[stage]:.1f} | {seconds[stage] / dense:.2f} |"
    rest = total - sum(seconds.values())
    yield f"| the rest: reading, tokenising, proving, writing | {rest:.1f} | {rest / dense:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
