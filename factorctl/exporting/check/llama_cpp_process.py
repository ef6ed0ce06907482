"""Run a GGUF file in llama.cpp, through the wheel xllamacpp: a program of its own, since a fault there is fatal.

Run `python -I llama_cpp_process.py REQUEST`, where REQUEST is a JSON file: {"gguf", "vocab_size", "sequences", "top",
"texts", "fragments", "ends", "prompts", "new_tokens", "threads", "answer"}. For every position of every sequence it
asks for the `top` most likely successors; it tokenises `texts` as prompts and `fragments` as parts of one, finds out
which of the tokens `ends` end a text, and continues `prompts` greedily. The answer goes to the JSON file `answer`.
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


def successors(llama: Any, sequence: list[int], top: int, letter: int) -> list[list[tuple[int, float]]]:
    """For every position: (id, log-probability) of the likeliest next tokens.

    The server reports none for a token that is no whole character. So it is made to emit `letter`, which is one; the
    log-probabilities are those before that bias.
    """
    found = []
    for end in range(1, len(sequence) + 1):
        (step,) = forced(llama, sequence[:end], letter, n_predict=1, n_probs=top)["completion_probabilities"]
        found.append([(candidate["id"], candidate["logprob"]) for candidate in step["top_logprobs"]])
    return found


def ends_text(llama: Any, token: int, letter: int) -> bool:
    """Whether generation stops at `token`."""
    return bool(forced(llama, [letter], token, n_predict=2)["stop_type"] == "eos")


def forced(llama: Any, prompt: list[int], token: int, **changes: Any) -> dict[str, Any]:
    """A completion of which every token is `token`."""
    return post(llama, "/completion", {"prompt": prompt, "logit_bias": [[token, 1e4]], **changes, **GREEDY})


def continuation(llama: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest continuation, without regard to end-of-text."""
    body = {"prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "return_tokens": True, **GREEDY}
    tokens: list[int] = post(llama, "/completion", body)["tokens"]
    return tokens


def tokenise(llama: Any, text: str, *, whole: bool = False, special: bool = True) -> list[int]:
    """Token ids as llama.cpp splits the text.

    Args:
        whole: add BOS and EOS as the file says.
        special: find special tokens in the text.
    """
    body = {"content": text, "add_special": whole, "parse_special": special}
    tokens: list[int] = post(llama, "/tokenize", body)["tokens"]
    return tokens


def whole_character(llama: Any, vocab_size: int) -> int:
    """An ordinary token that is text by itself, found by trying: no letter need be a token."""
    for token in range(vocab_size):
        text = post(llama, "/detokenize", {"tokens": [token]})["content"].strip()
        if not text or "\ufffd" in text or tokenise(llama, text, special=False) != [token]:
            continue
        if forced(llama, [token], token, n_predict=1, n_probs=1).get("completion_probabilities"):
            return token
    raise SystemExit("error: no token of the vocabulary is a whole character, so nothing can be asked")


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    llama = server(request)
    letter = whole_character(llama, request["vocab_size"]) if request["sequences"] or request["ends"] else 0
    answer = {
        "successors": [successors(llama, ids, request["top"], letter) for ids in request["sequences"]],
        "tokens": [tokenise(llama, text, whole=True) for text in request["texts"]],
        "fragments": [tokenise(llama, text) for text in request["fragments"]],
        "ending": [ends_text(llama, token, letter) for token in request["ends"]],
        "continuations": [continuation(llama, ids, request["new_tokens"]) for ids in request["prompts"]],
    }
    with open(request["answer"], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
