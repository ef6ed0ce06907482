"""Serve a GGUF file with llama.cpp, through the wheel xllamacpp: a program of its own, since a fault there is fatal.

Run `python -I llama_cpp_server.py REQUEST`, where REQUEST is a JSON object: {"gguf", "context", "threads"}. Once the
file is loaded it prints {"address": URL}, and serves until its stdin is closed. Keys, values and attention are what
llama.cpp takes by default.
"""

import json
import sys


def main() -> None:
    import xllamacpp

    request = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = request["gguf"]
    params.n_ctx = request["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
