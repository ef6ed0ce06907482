"""Install an engine into an environment of its own and compare what it generates with stock transformers.

Run by hand: it fetches hundreds of megabytes and takes minutes. Greedy tokens are compared one by one; an engine agrees
until its first other token, and a near tie may part two engines that are both right.

    python tests/engines/compare.py mlx-lm runs/demo-1S8E3K-hf
    python tests/engines/compare.py openvino runs/demo-1S8E3K-hf --environment /tmp/openvino --keep
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any, NamedTuple

PROGRAMS = Path(__file__).parent / "programs"
NEW_TOKENS = 48


class Engine(NamedTuple):
    """What to install, and the program that loads a directory and continues prompts with it."""

    requirements: tuple[str, ...]
    program: str


ENGINES = {
    "mlx-lm": Engine(("mlx[cpu]", "mlx-lm==0.32.2"), "mlx_lm_greedy.py"),
    "openvino": Engine(("optimum-intel[openvino]==2.2.0",), "openvino_greedy.py"),
    "vllm": Engine(("vllm==0.33.0",), "vllm_greedy.py"),
    "transformers-4": Engine(("transformers==4.57.6", "torch"), "transformers_greedy.py"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("export", type=Path, help="what `factorctl export` wrote")
    parser.add_argument("--environment", type=Path, help="where to install; a directory that is there is used as it is")
    parser.add_argument("--prompt", action="append", help="default: three of the passages that exports are compared on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engine-") as scratch:
        python = environment(ENGINES[options.engine], options.environment or Path(scratch, "environment"))
        prompts = prompt_ids(options.export, options.prompt)
        expected = stock_continuations(options.export, prompts)
        found = continuations(python, ENGINES[options.engine].program, options.export, prompts, Path(scratch))
    same = [agreeing(a, b) for a, b in zip(expected, found["continuations"], strict=True)]
    print(json.dumps({"engine": options.engine, "version": found["version"], "class": found["class"], "same": same}))
    sys.exit(0 if min(same) == NEW_TOKENS else 1)


def environment(engine: Engine, directory: Path) -> Path:
    """The interpreter of a virtual environment with the engine in it."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *engine.requirements], check=True)
    return python


def prompt_ids(export: Path, texts: list[str] | None) -> list[list[int]]:
    from transformers import AutoTokenizer

    from factorctl.exporting.check.text import PASSAGES

    tokenizer = AutoTokenizer.from_pretrained(export)
    return [tokenizer(text)["input_ids"] for text in texts or [" ".join(text.split()[:24]) for text in PASSAGES[:3]]]


def stock_continuations(export: Path, prompts: list[list[int]]) -> list[list[int]]:
    from factorctl.exporting.check.stock import StockJob, ask_stock

    (answer,) = ask_stock([StockJob(export, "float32", prompts[:1], prompts=prompts, new_tokens=NEW_TOKENS)])
    return answer.continuations


def continuations(python: Path, program: str, export: Path, prompts: list[list[int]], scratch: Path) -> dict[str, Any]:
    """What the engine says: {"version", "class", "continuations"}."""
    request, reply = scratch / "request.json", scratch / "reply.json"
    asked = {"directory": str(export.resolve()), "prompts": prompts, "new_tokens": NEW_TOKENS, "ends": ends_of(export)}
    request.write_text(json.dumps({**asked, "reply": str(reply)}))
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([python, PROGRAMS / program, request], check=True, env={**os.environ, **quiet})
    return dict(json.loads(reply.read_text()))


def ends_of(export: Path) -> list[int]:
    """The tokens that end a text, which transformers leaves out until enough tokens are made."""
    from transformers import GenerationConfig

    from_config = json.loads((export / "config.json").read_text()).get("eos_token_id")
    has_own = (export / "generation_config.json").is_file()
    ends = (GenerationConfig.from_pretrained(export).eos_token_id if has_own else None) or from_config
    return [ends] if isinstance(ends, int) else list(ends or [])


def agreeing(expected: list[int], found: list[int]) -> int:
    """How many tokens are the same before the first other one."""
    pairs = zip(expected, found, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))


if __name__ == "__main__":
    main()
