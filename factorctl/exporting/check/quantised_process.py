"""Load an export with `factorctl.load` and write its logits: the twin of `stock_process` for quantised experts.

Stock transformers cannot hold routed experts in few bits, so this process may import factorctl, as whoever uses such an
export has to. It is a process of its own all the same: it holds what a user's holds, and no more. Requests and replies
are those of `stock_process`; loading accounts for every tensor or fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from factorctl.exporting.check.stock_process import computed
from factorctl.models.quantised.loading import load_quantised, weight_bytes


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load one directory, which has no manifest yet, and compute logits and greedy continuations."""
    model = load_quantised(Path(job["directory"]), dtype=getattr(torch, job["dtype"]))
    return {"loading": {}, "memory_bytes": weight_bytes(model), **computed(model, job)}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for job in request["jobs"]:
        print(json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    main()
