"""GraniteMoeHybrid with attention layers alone: GraniteMoeShared's tensors, attention biases, and more engines."""

from __future__ import annotations

from typing import Any

from factorctl.exporting.engines import MLX_ROPE, SERVERS, Engine, Flaw
from factorctl.exporting.features import features_of
from factorctl.exporting.stock.architecture import Architecture
from factorctl.exporting.stock.architectures import granite_moe_shared
from factorctl.exporting.stock.padding import StockSizes
from factorctl.models.families import DenseModel


def _config(dense: DenseModel, num_experts: int, sizes: StockSizes) -> dict[str, Any]:
    """The mamba fields describe a layer that is nowhere; they are small, since engines plan their cache by them, and
    consistent, since configs are checked."""
    num_heads = features_of(dense).num_heads
    return {
        **granite_moe_shared.config(dense, num_experts, sizes),
        "layer_types": ["attention"] * dense.num_layers,
        "position_embedding_type": "rope",
        "mamba_expand": 1,
        "mamba_n_heads": num_heads,
        "mamba_d_head": dense.hidden_size // num_heads,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


ARCHITECTURE = Architecture(
    "granite-moe-hybrid",
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    shared="own",
    config=_config,
    experts=granite_moe_shared.experts,
    beside=granite_moe_shared.beside,
    block="block_sparse_moe",
    router="router",
    engines=(*SERVERS, Engine.MLX, Engine.OPENVINO, Engine.ONNX),
    flaws=(
        MLX_ROPE,
        Flaw(Engine.ONNX, lambda served: True, "builds the shared neurons alone and drops every routed expert"),
    ),
    biases="query-key-value-output",
)
