"""How many prompts fit the memory at hand."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from factorctl.memory import free_memory

MAX_ROWS = 64
CPU_TOKENS = 2048
"""Tokens after which a larger batch gains a CPU nothing."""
SHARE = 0.5
"""Of the free memory, since the estimate knows nothing of the allocator or the neighbours."""


def fitting_batch_size(model: PreTrainedModel, length: int) -> int:
    """Rows of `length` tokens that may go through `model` at once: at least 1, at most 64."""
    device = model.device
    rows = int(SHARE * free_memory(device)) // row_bytes(model.config, length, model.dtype.itemsize)
    if device.type == "cpu":
        rows = min(rows, CPU_TOKENS // length)
    return max(1, min(rows, MAX_ROWS))


def row_bytes(config: Any, length: int, itemsize: int) -> int:
    """Bytes that one row of `length` tokens takes at its peak: logits three times over, one layer, the KV cache."""
    config = config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // heads
    key_values = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head
    layer = 8 * hidden + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden) + heads * length
    return int(length * itemsize * (3 * config.vocab_size + layer + key_values))
