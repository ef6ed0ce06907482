"""GGUF files of tiny models, written by llama.cpp's own package: its writer, its names of tensors, its layouts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter, TokenType

ARCHITECTURES = {"gemma3_text": "gemma3"}
"""transformers' model type -> llama.cpp's architecture, where they differ."""


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """`rope_freqs` as llama.cpp's converter computes it."""
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(factors, dtype=np.float32)


def write_model(
    path: Path,
    model: Any,
    tokenizer: Path,
    *,
    pre: str = "gpt-2",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    arch: str | None = None,
    keys: Iterable[Callable[[GGUFWriter], Any]] = (),
    tensors: Mapping[str, np.ndarray] | None = None,
    without: Iterable[str] = (),
) -> Path:
    """Write `model` and the byte-level tokenizer of the directory `tokenizer` as llama.cpp's converter would.

    Args:
        keys: called with the writer after everything else was set.
        tensors: further tensors of the file.
        without: tensors to leave out.
    """
    config = model.config
    arch = arch or ARCHITECTURES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, arch)
    writer.add_name("tiny")
    _add_sizes(writer, config)
    _add_tokenizer(writer, json.loads((tokenizer / "tokenizer.json").read_text()), config.vocab_size, pre)
    for add in keys:
        add(writer)
    for name, values in {**_tensors(model, arch), **(tensors or {})}.items():
        if name in set(without):
            continue
        if kind != gguf.GGMLQuantizationType.F32 and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)


def _add_tokenizer(writer: GGUFWriter, raw: Mapping[str, Any], size: int, pre: str) -> None:
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, index in raw["model"]["vocab"].items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
    for added in raw["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_add_bos_token(True)


def _tensors(model: Any, arch: str) -> dict[str, np.ndarray]:
    """llama.cpp's names and layouts: q and k in pairs for `llama`, norms raised by one for Gemma."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    tensors = {}
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        stem, _, kind = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{kind}"
        heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
        if arch == "llama" and (count := heads.get(stored.split(".")[-2])):
            value = value.reshape(count, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and stored.endswith("norm.weight"):
            value = value + 1
        tensors[stored] = np.ascontiguousarray(value.detach().to(torch.float32).numpy())
    return tensors
