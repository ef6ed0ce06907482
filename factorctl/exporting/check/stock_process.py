"""Load an export with stock transformers and write its logits: a program of its own, run in a process of its own.

It refuses every import of factorctl, so that what it loads, anybody can load. Run `python -I stock_process.py REQUEST`,
where REQUEST is a JSON file: {"jobs": [{"directory", "dtype", "sequences", "positions", "num_experts_per_tok",
"by_layer", "prompts", "new_tokens", "answers"}]}.
Prints one JSON object per job. What it computed goes to the safetensors file `answers`: `logits.INDEX`, a [tokens,
vocabulary] tensor per sequence, and `router.LAYER`, the router logits [tokens of all sequences, experts] of each layer
that has a router. Experts run in transformers' plain loop, `eager`: the function, not a kernel, is what is asked for.
"""

import json
import sys
from pathlib import Path
from typing import Any


class RefuseFactorctl:
    """An import finder that lets nothing of factorctl through."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in {"factorctl", "factorctl_plugins"}:
            raise ImportError(f"{name} must not be imported here: an export has to load without it")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load one directory, account for its tensors, compute logits and greedy continuations."""
    return run_by_layer(job) if job["by_layer"] else run_whole(job)


def run_whole(job: dict[str, Any]) -> dict[str, Any]:
    """As everybody loads it, all of it in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        job["directory"],
        dtype=getattr(torch, job["dtype"]),
        output_loading_info=True,
        local_files_only=True,
        experts_implementation="eager",
        **active_experts(job),
    )
    model, info = loaded
    return {"loading": faults(info), "memory_bytes": model.get_memory_footprint(), **computed(model.eval(), job)}


def run_by_layer(job: dict[str, Any]) -> dict[str, Any]:
    """The same function with one decoder layer in memory: each layer is loaded as a model of one layer.

    Everything around a layer (embeddings, masks, rotary embeddings, norm, head) is the stock class's own code; only the
    layer's input is replaced by what the layer before it gave.
    """
    import torch
    from transformers import AutoConfig

    directory = Path(job["directory"])
    config: Any = AutoConfig.from_pretrained(directory, local_files_only=True, **active_experts(job))
    found, hidden = tensors_of(directory), None
    loading: dict[str, list[str]] = {}
    routers: dict[str, Any] = {}
    for layer in range(config.num_hidden_layers):
        ends = layer in (0, config.num_hidden_layers - 1)
        model, info = one_layer(config, layer, found, getattr(torch, job["dtype"]), with_vocabulary=ends)
        loading |= faults(info)
        logits, seen, hidden = forward(model, job, hidden=hidden, with_vocabulary=ends)
        routers |= {f"router.{layer}": values for values in seen.values()}
    if strays := [name for name in found if layer_of(name) >= config.num_hidden_layers]:
        loading["unexpected_keys"] = sorted(strays)
    save(job, logits, routers)
    return {"loading": loading, "memory_bytes": 0, "class": type(model).__name__, "continuations": []}


def active_experts(job: dict[str, Any]) -> dict[str, Any]:
    """The number of active experts as an override of config.json, where the job names one."""
    return {"num_experts_per_tok": job["num_experts_per_tok"]} if job["num_experts_per_tok"] else {}


def faults(info: dict[str, Any]) -> dict[str, list[str]]:
    """What the loader reports: missing, unexpected, misshaped."""
    return {kind: sorted(map(str, names)) for kind, names in info.items() if names}


def tensors_of(directory: Path) -> dict[str, Path]:
    """Name -> file of every tensor."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def layer_of(name: str) -> int:
    """The decoder layer that a tensor belongs to; -1 for the rest of the model."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def one_layer(config: Any, layer: int, found: dict[str, Path], dtype: Any, *, with_vocabulary: bool) -> tuple[Any, Any]:
    """The stock class with decoder layer `layer` alone; a vocabulary of one zero row where no token is looked up."""
    import copy

    import torch
    import transformers
    from safetensors import safe_open

    alone = copy.deepcopy(config)
    for key, value in config.to_dict().items():  # what is said layer by layer: layer_types and the like
        if isinstance(value, list) and len(value) == config.num_hidden_layers and key != "architectures":
            setattr(alone, key, value[layer : layer + 1])
    alone.num_hidden_layers = 1
    state = {}
    for name, path in found.items():
        if layer_of(name) in (-1, layer):
            with safe_open(path, "pt") as file:
                state[name.replace(f".layers.{layer}.", ".layers.0.", 1)] = file.get_tensor(name)
    if not with_vocabulary:
        alone.vocab_size, alone.pad_token_id = 1, None
        state = {
            name: torch.zeros(1, config.hidden_size) if name.startswith(("model.embed", "lm_head")) else tensor
            for name, tensor in state.items()
        }
    stock_class = getattr(transformers, config.architectures[0])
    loaded: tuple[Any, Any] = stock_class.from_pretrained(
        None, config=alone, state_dict=state, dtype=dtype, output_loading_info=True, experts_implementation="eager"
    )
    return loaded[0].eval(), loaded[1]


def computed(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What a loaded model makes of the job; its answers go to the file."""
    logits, routers, _ = forward(model, job)
    save(job, logits, {f"router.{layer}": values for layer, values in routers.items()})
    continuations = [greedy(model, prompt, job["new_tokens"]) for prompt in job["prompts"]]
    return {"class": type(model).__name__, "continuations": continuations}


def forward(model: Any, job: dict[str, Any], *, hidden: Any = None, with_vocabulary: bool = True) -> tuple[Any, ...]:
    """All sequences at once, padded behind their ends, which a causal model does not see.

    Args:
        hidden: what the first decoder layer is given instead of the embeddings.

    Returns:
        (logits [sequences, length, vocabulary], layer -> router logits [tokens, experts], output of the last layer)
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    padded = pad_sequence([torch.tensor(ids) for ids in job["sequences"]], batch_first=True, padding_value=-1)
    positions = pad_sequence([torch.tensor(places) for places in job["positions"]], batch_first=True)
    real, routers, last = padded >= 0, dict[int, Any](), dict[str, Any]()

    def give(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return ((hidden, *arguments[1:]), named) if arguments else (arguments, {**named, "hidden_states": hidden})

    def note(router: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].reshape(*real.shape, -1)[real]
        routers[router.layer] = (x.to(router.weight.dtype) @ router.weight.T).float()

    layers, hooks = model.model.layers, []
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if "router" in type(module).__name__.lower() and hasattr(module, "weight"):
                module.layer = index
                hooks.append(module.register_forward_pre_hook(note))
    if hidden is not None:
        hooks.append(layers[0].register_forward_pre_hook(give, with_kwargs=True))
    hooks.append(layers[-1].register_forward_hook(lambda _, __, output: last.update(output=output)))
    ids = padded.clamp_min(0) if with_vocabulary else torch.zeros_like(padded)
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    output = last["output"]
    return logits, routers, output[0] if isinstance(output, tuple) else output


def save(job: dict[str, Any], logits: Any, routers: dict[str, Any]) -> None:
    """Write the answers, padding left out."""
    from safetensors.torch import save_file

    rows = {f"logits.{index}": logits[index, : len(ids)].float() for index, ids in enumerate(job["sequences"])}
    save_file({name: tensor.contiguous() for name, tensor in {**rows, **routers}.items()}, job["answers"])


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
