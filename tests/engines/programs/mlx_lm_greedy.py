"""Continue prompts with mlx-lm, inside its own environment: `python mlx_lm_greedy.py REQUEST`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

request = json.loads(Path(sys.argv[1]).read_text())
model, _ = load(request["directory"])
model.set_dtype(mx.float32)
ends = mx.array(request["ends"])


def without_an_end(tokens: mx.array, logits: mx.array) -> mx.array:
    """As `min_new_tokens` of transformers: the text goes on."""
    return mx.put_along_axis(logits, ends[None], mx.array(-mx.inf, logits.dtype), axis=-1)


continuations = [
    [
        int(token)
        for token, _ in generate_step(
            mx.array(prompt), model, max_tokens=request["new_tokens"], logits_processors=[without_an_end]
        )
    ]
    for prompt in request["prompts"]
]
answer = {"version": version("mlx-lm"), "class": type(model).__module__, "continuations": continuations}
Path(request["reply"]).write_text(json.dumps(answer))
