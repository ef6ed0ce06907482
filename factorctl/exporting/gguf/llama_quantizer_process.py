"""Quantise a GGUF file with llama.cpp, through the wheel cyllama: a program of its own, since a fault there is fatal.

Run `python -I llama_quantizer_process.py PLAIN OUT TYPE THREADS`, where TYPE is llama.cpp's number of a file type.
"""

import sys


def main() -> None:
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

    plain, out, kind, threads = sys.argv[1:]
    params = LlamaModelQuantizeParams()
    params.ftype = int(kind)
    params.nthread = int(threads)
    model_quantize(plain, out, params)


if __name__ == "__main__":
    main()
