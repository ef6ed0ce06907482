"""Run a GGUF file in llama.cpp, through the wheel xllamacpp: a program of its own, since a fault there is fatal.

Run `python -I llama_cpp_process.py REQUEST`, where REQUEST is a JSON file: {"gguf", "sequences", "texts", "top",
"prompts", "new_tokens", "threads", "answer"}. For every position of every sequence it asks for the `top` most likely
successors; it tokenises `texts` and continues `prompts` greedily. The answer goes to the JSON file `answer`.
"""

import json
import sys
import urllib.request
from typing import Any

GREEDY = {"temperature": 0, "repeat_penalty": 1.0, "cache_prompt": True}


def server(request: dict[str, Any]) -> Any:
    """llama.cpp's server on the CPU, with keys and values kept in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["gguf"]
    params.n_ctx = 1024
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    return xllamacpp.Server(params)


def post(llama: Any, route: str, body: dict[str, Any]) -> dict[str, Any]:
    """One request to the server, past any proxy."""
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{llama.listening_address}{route}", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def successors(llama: Any, sequence: list[int], top: int) -> list[list[tuple[int, float]]]:
    """For every position: (id, log-probability) of the likeliest next tokens.

    The server reports none for a token that is no whole character. So it is made to emit a letter; the
    log-probabilities are those before that bias.
    """
    (letter,) = tokenise(llama, "a", special=False)
    found = []
    for end in range(1, len(sequence) + 1):
        body = {"prompt": sequence[:end], "n_predict": 1, "n_probs": top, "logit_bias": [[letter, 1e4]], **GREEDY}
        (step,) = post(llama, "/completion", body)["completion_probabilities"]
        found.append([(candidate["id"], candidate["logprob"]) for candidate in step["top_logprobs"]])
    return found


def continuation(llama: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest continuation, without regard to end-of-text."""
    body = {"prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "return_tokens": True, **GREEDY}
    tokens: list[int] = post(llama, "/completion", body)["tokens"]
    return tokens


def tokenise(llama: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids as llama.cpp splits the text; with `special`, BOS and EOS as the file says."""
    tokens: list[int] = post(llama, "/tokenize", {"content": text, "add_special": special})["tokens"]
    return tokens


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    llama = server(request)
    answer = {
        "successors": [successors(llama, ids, request["top"]) for ids in request["sequences"]],
        "tokens": [tokenise(llama, text) for text in request["texts"]],
        "continuations": [continuation(llama, ids, request["new_tokens"]) for ids in request["prompts"]],
    }
    with open(request["answer"], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
