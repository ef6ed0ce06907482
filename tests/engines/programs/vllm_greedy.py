"""Continue prompts with vLLM, inside its own environment: `python vllm_greedy.py REQUEST`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file
    request = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(request["directory"], dtype="float32", enforce_eager=True, max_model_len=512, skip_tokenizer_init=True)
    count = request["new_tokens"]
    greedy = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy)
    answer = {
        "version": version("vllm"),
        "class": json.loads(Path(request["directory"], "config.json").read_text())["architectures"][0],
        "continuations": [list(output.outputs[0].token_ids) for output in outputs],
    }
    Path(request["reply"]).write_text(json.dumps(answer))
