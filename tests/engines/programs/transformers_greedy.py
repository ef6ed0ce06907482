"""Continue prompts with another release of transformers, in its own environment: `transformers_greedy.py REQUEST`."""

import json
import sys
from pathlib import Path

import torch
import transformers

request = json.loads(Path(sys.argv[1]).read_text())
transformers.AutoTokenizer.from_pretrained(request["directory"])
model = transformers.AutoModelForCausalLM.from_pretrained(request["directory"], torch_dtype=torch.float32).eval()
continuations = []
for prompt in request["prompts"]:
    ids, count = torch.tensor([prompt]), request["new_tokens"]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    continuations.append(output[0, len(prompt) :].tolist())
answer = {"version": transformers.__version__, "class": type(model).__name__, "continuations": continuations}
Path(request["reply"]).write_text(json.dumps(answer))
