"""The dense architectures of GGUF files: where transformers keeps each tensor, and which config each key fills.

Every key and every tensor of a file finds its place here or is refused by name, because whatever is skipped in silence
gives another model. Sources: llama.cpp `src/llama-model.cpp`, `src/models/{llama,qwen2,qwen3,phi3,gemma*}.cpp`, and its
converter `conversion/*.py`, whose changes of layout are undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from factorctl.checkpoint.gguf.header import GIVE_HF, GgufHeader
from factorctl.checkpoint.gguf.keys import Hyperparameters
from factorctl.checkpoint.gguf.rope import rope_parameters
from factorctl.errors import UsageError

Settings = dict[str, object]

REST = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_FFN = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp stores one of transformers' model types."""

    model_type: str
    layer: Mapping[str, str]
    """Module of a decoder layer in transformers -> its name in `blk.N.`."""
    extra: Callable[[GgufHeader, Hyperparameters, Settings], None] = field(default=lambda header, keys, settings: None)
    """Fills in what this family alone has."""
    interleaved: bool = False
    """The rows of each head in q and k stand in neighbouring pairs, instead of half by half."""
    optional_biases: bool = False
    """Biases of attention and FFN stand in the file where the model has them; those that it lacks are zero."""
    raised_norms: bool = False
    """Norm weights are stored with one added (Gemma)."""


def _gemma(header: GgufHeader, keys: Hyperparameters, settings: Settings) -> None:
    """Gemma's head size is always spelt out."""
    settings["hidden_activation"] = "gelu_pytorch_tanh"


def _gemma2(header: GgufHeader, keys: Hyperparameters, settings: Settings) -> None:
    _gemma(header, keys, settings)
    settings["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0)
    settings["final_logit_softcapping"] = keys.number("final_logit_softcapping", 30.0)
    settings["sliding_window"] = keys.integer("attention.sliding_window", 4096)
    settings["layer_types"] = _layer_types(keys, settings, usual=2)
    settings["query_pre_attn_scalar"] = _attention_scalar(settings, layers_of_27b=46)


def _gemma3(header: GgufHeader, keys: Hyperparameters, settings: Settings) -> None:
    _gemma(header, keys, settings)
    settings["final_logit_softcapping"] = keys.number("final_logit_softcapping", 0.0) or None
    window = keys.integer("attention.sliding_window", 0)
    settings["layer_types"] = _layer_types(keys, settings, usual=6 if window else 1)
    settings["sliding_window"] = window or settings["max_position_embeddings"]
    settings["query_pre_attn_scalar"] = _attention_scalar(settings, layers_of_27b=62)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    settings["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}


def _phi3(header: GgufHeader, keys: Hyperparameters, settings: Settings) -> None:
    """llama.cpp reads Phi-3's window and does not use it; transformers, as its authors, does."""
    settings["sliding_window"] = keys.integer("attention.sliding_window", 0) or None
    settings["original_max_position_embeddings"] = keys.integer(
        "rope.scaling.original_context_length", int(str(settings["max_position_embeddings"]))
    )


def _layer_types(keys: Hyperparameters, settings: Settings, *, usual: int) -> list[str]:
    """Which layers slide: all but every n-th, or as a list in the file says."""
    stated = keys.header.keys.get(keys.name("attention.sliding_window_pattern"))
    keys.pass_over("attention.sliding_window_pattern")
    layers = range(int(str(settings["num_hidden_layers"])))
    if isinstance(stated, list):
        slides = [bool(stated[layer]) if layer < len(stated) else False for layer in layers]
    else:
        every = int(stated or usual)
        slides = [(layer + 1) % every != 0 for layer in layers]
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides]


def _attention_scalar(settings: Settings, *, layers_of_27b: int) -> int:
    """Scale of attention: head_dim, but hidden_size / heads in the one size that llama.cpp knows by its layers."""
    if settings["num_hidden_layers"] == layers_of_27b:
        return int(str(settings["hidden_size"])) // int(str(settings["num_attention_heads"]))
    return int(str(settings["head_dim"]))


FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("llama", {**_ATTENTION, **_FFN, **_NORMS}, interleaved=True, optional_biases=True),
    "qwen2": GgufFamily("qwen2", {**_ATTENTION, **_FFN, **_NORMS}),
    "qwen3": GgufFamily("qwen3", {**_ATTENTION, **_HEAD_NORMS, **_FFN, **_NORMS}, optional_biases=True),
    "phi3": GgufFamily("phi3", {**_FUSED, **_NORMS}, _phi3),
    "gemma": GgufFamily("gemma", {**_ATTENTION, **_FFN, **_NORMS}, _gemma, raised_norms=True),
    "gemma2": GgufFamily("gemma2", {**_ATTENTION, **_FFN, **_FOUR_NORMS}, _gemma2, raised_norms=True),
    "gemma3": GgufFamily(
        "gemma3_text", {**_ATTENTION, **_HEAD_NORMS, **_FFN, **_FOUR_NORMS}, _gemma3, raised_norms=True
    ),
}
"""llama.cpp's `general.architecture` -> how it is read."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (1.0, 0.0),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0, 0.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (1.0, 0.0),
    "use_parallel_residual": (False,),
}
"""Keys that some writers set in every file, and what they must say to change nothing."""


def family_of(header: GgufHeader) -> GgufFamily:
    """Raises:
    UsageError: the architecture is not in the table, or is a mixture of experts.
    """
    arch = header.architecture
    experts = header.keys.get(f"{arch}.expert_count", 0)
    if experts or any("_exps." in name for name in header.tensors):
        raise UsageError(
            f"{header.path} already is a mixture of experts ({arch}.expert_count = {experts})",
            "give the .gguf file of a dense model",
        )
    if arch not in FAMILIES:
        raise UsageError(
            f"{header.path} is of architecture {arch!r}, which is not read from GGUF files",
            f"known: {', '.join(FAMILIES)}; {GIVE_HF}",
        )
    return FAMILIES[arch]


def config_settings(header: GgufHeader, family: GgufFamily) -> Settings:
    """The fields of config.json that the file's keys and tensors state.

    Raises:
        UsageError: naming the first key that finds no place, or that contradicts a tensor.
    """
    keys = Hyperparameters(header)
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden // max(heads, 1))
    keys.expect("attention.value_length", head_dim)
    keys.expect("expert_count", 0)
    settings: Settings = {
        "model_type": family.model_type,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(header, keys, head_dim=head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": _vocabulary(header, keys),
        "dtype": "float32",
        **_token_ids(header),
        **_biases(header, family),
    }
    family.extra(header, keys, settings)
    _check_neutral(header, keys, settings)
    keys.pass_over("tensor_data_layout")
    keys.refuse_rest()
    return settings


def _token_ids(header: GgufHeader) -> Settings:
    """Ids that a row of the embedding has; the tokenizer's reader says what else may stand there."""
    rows = header.tensors["token_embd.weight"].shape[0]
    roles = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {field: header.keys.get(f"tokenizer.ggml.{role}_token_id") for field, role in roles.items()}
    return {field: index if index is not None and 0 <= index < rows else None for field, index in ids.items()}


def _check_neutral(header: GgufHeader, keys: Hyperparameters, settings: Settings) -> None:
    for key, allowed in _NEUTRAL.items():
        taken_by_family = key in {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
        if taken_by_family and key.rpartition(".")[2] in settings:
            continue
        if key == "attention.sliding_window":
            _expect_no_window(header, keys, int(str(settings["max_position_embeddings"])))
        elif key == "attention.scale":
            keys.expect(key, 0.0, int(str(settings["head_dim"])) ** -0.5)
        else:
            keys.expect(key, *allowed)


def _expect_no_window(header: GgufHeader, keys: Hyperparameters, context: int) -> None:
    """A window as long as the context is none; llama.cpp runs these families without one."""
    window = keys.integer("attention.sliding_window", 0)
    if 0 < window < context:
        raise UsageError(
            f"{header.path} sets {keys.name('attention.sliding_window')} = {window}, shorter than its context of "
            f"{context}; {header.architecture} files are read without a window",
            GIVE_HF,
        )
    keys.pass_over("attention.sliding_window_pattern")


def _vocabulary(header: GgufHeader, keys: Hyperparameters) -> int:
    """Rows of the embedding, which the key and the token list must both state."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UsageError(f"{header.path} lacks tensor token_embd.weight", "fetch the file again")
    rows, tokens = embedding.shape[0], header.keys.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        raise UsageError(
            f"{header.path} lists {len(tokens)} tokens (tokenizer.ggml.tokens), and token_embd.weight has {rows} rows",
            GIVE_HF,
        )
    keys.expect("vocab_size", rows)
    return rows


def _biases(header: GgufHeader, family: GgufFamily) -> dict[str, Any]:
    """Whether the file has biases of attention and FFN, where the family may have them."""
    if not family.optional_biases:
        return {}
    found = {name.split(".")[2] for name in header.tensors if name.startswith("blk.") and name.endswith(".bias")}
    biases: dict[str, Any] = {"attention_bias": bool(found & set(_ATTENTION.values()))}
    if family.model_type == "llama":
        biases["mlp_bias"] = bool(found & set(_FFN.values()))
    return biases
