"""What a rehearsal of the GPU session runs on: a model as wide between as the demo and tiny otherwise, text and tasks.

python tests/benchmarks/gpu_rehearsal.py DIRECTORY
"""

from __future__ import annotations

import itertools
import json
import lzma
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.tasks import make_task_data  # noqa: E402
from support.tiny import make_documents, make_source  # noqa: E402  # tests/ has to be on the path first

NEURONS = 1536
"""The demo's, so that every split of the real run is a split here."""


def main() -> int:
    directory = Path(sys.argv[1])
    make_source(
        directory / "model",
        intermediate_size=NEURONS,
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=4096,
    )
    text = directory / "text"
    text.mkdir(parents=True, exist_ok=True)
    for name, documents in {"train-00": 400, "train-01": 100, "valid": 24, "select": 24}.items():
        plain = make_documents(text / f"{name}.jsonl", documents=documents, seed=len(name) + documents)
        (text / f"{name}.jsonl.xz").write_bytes(lzma.compress(with_domains(plain.read_text()).encode()))
        plain.unlink()
    (directory / "bench").mkdir(exist_ok=True)
    make_task_data(directory / "bench", rows=4)
    return 0


def with_domains(lines: str) -> str:
    domains = itertools.cycle(["wiki", "code", "books", "textbook"])
    records = (json.loads(line) | {"domain": domain} for line, domain in zip(lines.splitlines(), domains, strict=False))
    return "".join(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    sys.exit(main())
