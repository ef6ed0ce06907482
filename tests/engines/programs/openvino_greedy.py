"""Continue prompts with OpenVINO through optimum-intel, in its own environment: `python openvino_greedy.py REQUEST`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from optimum.intel import OVModelForCausalLM

request = json.loads(Path(sys.argv[1]).read_text())
model = OVModelForCausalLM.from_pretrained(
    request["directory"],
    export=True,
    load_in_8bit=False,
    # By default it keeps keys and values in 8 bits, which is enough to part two greedy texts.
    ov_config={"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": "1"},
)
continuations = []
for prompt in request["prompts"]:
    ids, count = torch.tensor([prompt]), request["new_tokens"]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    continuations.append(output[0, len(prompt) :].tolist())
answer = {
    "version": f"optimum-intel {version('optimum-intel')}, openvino {version('openvino')}",
    "class": model.config.architectures[0],
    "continuations": continuations,
}
Path(request["reply"]).write_text(json.dumps(answer))
