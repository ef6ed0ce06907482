"""Tiny dense models of every family, a tiny tokenizer and a little text, all made on the fly."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from factorctl.config.factorize import FactorizeConfig
from factorctl.ffn.layer import FactoredFFN
from factorctl.models.families import DenseModel, dense_model
from factorctl.pipeline.factorize.run import FactorizeResult, factorize
from factorctl.progress import SilentProgress

VOCAB, HIDDEN, INTERMEDIATE, LAYERS = 40, 32, 48, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 3}),
}
"""Name -> (model type, what differs from COMMON): every family, and Llama with biases and with tied embeddings."""

LLAMA3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""RoPE scaled as Llama 3.1 scales it, within the context of a tiny model."""


def dense_outline(case: str = "llama", **changes: Any) -> DenseModel:
    """What is known of a case without weights."""
    model_type, differences = CASES[case]
    return dense_model({**COMMON, **differences, **changes, "model_type": model_type}, origin="test")


def make_model(case: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, none of them zero or one: biases and norms could go missing unseen otherwise."""
    model_type, differences = CASES[case]
    config = AutoConfig.for_model(model_type, **{**COMMON, **differences, **changes})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per letter, space and newline: byte-level, which is what every tokenizer class of transformers reads."""
    ids = {token: index for index, token in enumerate([*SPECIAL, *LETTERS, "Ġ", "Ċ"])}
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def make_source(
    directory: Path, case: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """A Hugging Face directory with a tiny model and its tokenizer."""
    make_model(case, dtype=dtype, seed=seed, **changes).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_text(path: Path, *, words: int = 1000, seed: int = 0) -> Path:
    """A text file of random words of five letters, in paragraphs of fifty."""
    draw = random.Random(seed)
    paragraphs = [" ".join("".join(draw.choices(LETTERS, k=5)) for _ in range(50)) for _ in range(words // 50)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def make_documents(path: Path, *, documents: int = 80, seed: int = 0) -> Path:
    """A .jsonl file of documents of twenty such words."""
    draw = random.Random(seed)
    texts = [" ".join("".join(draw.choices(LETTERS, k=5)) for _ in range(20)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def some_ids(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Ids of letters, [rows, length]."""
    first, last = len(SPECIAL), len(SPECIAL) + len(LETTERS)
    return torch.randint(first, last, (rows, length), generator=torch.Generator().manual_seed(seed))


def spy_on_routers(monkeypatch: pytest.MonkeyPatch) -> set[tuple[torch.dtype, torch.dtype]]:
    """The dtypes of every router's input and logits, from here on."""
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    genuine = FactoredFFN.router_logits

    def spy(ffn: FactoredFFN, x_TD: torch.Tensor) -> torch.Tensor:
        logits_TN = genuine(ffn, x_TD)
        seen.add((x_TD.dtype, logits_TN.dtype))
        return logits_TN

    monkeypatch.setattr(FactoredFFN, "router_logits", spy)
    return seen


def weights_only(source: Path, out: Path, **changes: Any) -> FactorizeConfig:
    """A configuration that needs no calibration unless `changes` ask for it."""
    plain = FactorizeConfig(
        model=str(source), num_experts=4, strategy="contiguous", router="random", device="cpu", out=out
    )
    return dataclasses.replace(plain, **changes)


def calibrated(source: Path, out: Path, text: Path, **changes: Any) -> FactorizeConfig:
    """A configuration with every closed-form step, on 1024 tokens of `text`."""
    everything = {
        "router": "analytic",
        "shared_fraction": 0.25,
        "scale": "fitted",
        "refit": True,
        "calibration": str(text),
        "calibration_tokens": 1024,
    }
    return weights_only(source, out, **(everything | changes))


def factorize_quietly(config: FactorizeConfig) -> FactorizeResult:
    return factorize(config, SilentProgress())


def directory_bytes(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by its relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def leftovers(out: Path) -> list[str]:
    """What a failed run left beside `out`: partial directories, locks, temporary files."""
    return sorted(path.name for path in out.parent.glob(f".{out.name}.*")) if out.parent.exists() else []
