"""Load an export with stock transformers and write its logits: a program of its own, run in a process of its own.

It refuses every import of factorctl, so that what it loads, anybody can load. Run `python -I stock_process.py REQUEST`,
where REQUEST is a JSON file: {"jobs": [{"directory", "dtype", "sequences", "prompts", "new_tokens", "experts",
"logits"}]}.
Prints one JSON object per job; logits go to the safetensors file `logits`, a [tokens, vocabulary] tensor per sequence.
"""

import json
import sys
from typing import Any


class RefuseFactorctl:
    """An import finder that lets nothing of factorctl through."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in {"factorctl", "factorctl_plugins"}:
            raise ImportError(f"{name} must not be imported here: an export has to load without it")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load one directory, account for its tensors, compute logits and greedy continuations."""
    import torch
    from transformers import AutoModelForCausalLM

    chosen = {"experts_implementation": job["experts"]} if job["experts"] else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        job["directory"], dtype=getattr(torch, job["dtype"]), output_loading_info=True, local_files_only=True, **chosen
    )
    model, info = loaded
    loading = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    return {"loading": loading, "memory_bytes": model.get_memory_footprint(), **computed(model.eval(), job)}


def computed(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What a loaded model makes of the job; its logits go to the file."""
    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        logits = {
            str(index): model(torch.tensor([ids])).logits[0].float() for index, ids in enumerate(job["sequences"])
        }
        save_file(logits, job["logits"])
        continuations = [greedy(model, prompt, job["new_tokens"]) for prompt in job["prompts"]]
    return {"class": type(model).__name__, "continuations": continuations}


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest continuation, token by token, without regard to end-of-text."""
    import torch

    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    continuation: list[int] = output[0, len(prompt) :].tolist()
    return continuation


def main() -> None:
    sys.meta_path.insert(0, RefuseFactorctl())
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    for job in request["jobs"]:
        print(json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    main()
