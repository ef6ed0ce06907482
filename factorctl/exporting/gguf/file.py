"""A GGUF file, written tensor by tensor with the metadata that llama.cpp's graphs read, and read back."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, RopeScalingType

from factorctl.checkpoint.reader import CheckpointReader, all_finite
from factorctl.errors import UsageError
from factorctl.exporting.features import Features, features_of
from factorctl.exporting.gguf.identity import Identity
from factorctl.exporting.gguf.llama_quantizer import file_type
from factorctl.exporting.gguf.tensors import PLAIN_QUANTS, GgufLayout, storage_type, stored_bytes, to_numpy
from factorctl.exporting.gguf.tokenizer import GgufTokenizer
from factorctl.exporting.stock.shards import planned_tensors
from factorctl.ffn.spec import FactoredSpec
from factorctl.files.publishing import writable
from factorctl.models.families import DenseModel
from factorctl.progress import Progress

GGUF_NAME = "model.gguf"


def planned_bytes(layout: GgufLayout, reader: CheckpointReader, quant: str) -> int:
    """Bytes of all tensors as they will be stored."""
    tensors = planned_tensors(layout, reader)
    return sum(stored_bytes(tensor.shape, storage_type(tensor.name, tensor.shape, quant)) for tensor in tensors)


def fallbacks(layout: GgufLayout, reader: CheckpointReader, quant: str) -> int:
    """How many tensors stay f16 because their rows are no whole number of the type's blocks."""
    kinds = [(t, storage_type(t.name, t.shape, quant)) for t in planned_tensors(layout, reader)]
    return sum(kind is GGMLQuantizationType.F16 and quant != "f16" for _, kind in kinds)


def write_gguf(
    path: Path,
    layout: GgufLayout,
    spec: FactoredSpec,
    reader: CheckpointReader,
    tokenizer: GgufTokenizer,
    *,
    identity: Identity,
    quant: str,
    progress: Progress,
) -> None:
    """Write `path`; at most one layer is in memory.

    Raises:
        UsageError: a value does not fit the storage type.
    """
    writer = GGUFWriter(None, layout.graph.name)
    add_metadata(writer, layout.native.dense, spec, layout, quant=quant)
    identity.add_to(writer)
    tokenizer.add_to(writer)
    for tensor in planned_tensors(layout, reader):
        kind = storage_type(tensor.name, tensor.shape, quant)
        size = stored_bytes(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    with writable(path):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.stage("Writing", total=layout.num_units, unit="layer") as task:
            for unit in range(layout.num_units):
                _write_unit(writer, layout, unit, reader, quant)
                task.advance()
        writer.close()


def _write_unit(writer: GGUFWriter, layout: GgufLayout, unit: int, reader: CheckpointReader, quant: str) -> None:
    for name, tensor in layout.unit(unit, reader.read).items():
        kind = storage_type(name, tensor.shape, quant)
        if not all_finite(tensor) or (
            kind is GGMLQuantizationType.F16 and tensor.abs().max() > np.finfo(np.float16).max
        ):
            raise UsageError(f"tensor {name} overflows {kind.name.lower()}", "choose --quant bf16 or f32")
        writer.write_tensor_data(gguf.quantize(to_numpy(tensor), kind))


def add_metadata(writer: GGUFWriter, dense: DenseModel, spec: FactoredSpec, layout: GgufLayout, *, quant: str) -> None:
    """Sizes, RoPE and experts under the keys that llama.cpp reads."""
    features, shape = features_of(dense), spec.shape
    writer.add_file_type(file_type(quant))
    if quant not in PLAIN_QUANTS.values():
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(int(dense.config.vocab_size))
    writer.add_context_length(gguf_context(features))
    writer.add_embedding_length(dense.hidden_size)
    writer.add_block_count(dense.num_layers)
    writer.add_head_count(features.num_heads)
    writer.add_head_count_kv(features.num_kv_heads)
    writer.add_key_length(features.head_dim)
    writer.add_value_length(features.head_dim)
    writer.add_layer_norm_rms_eps(float(dense.config.rms_norm_eps))
    _add_rope(writer, features)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.top_k)
    for key, value in layout.graph.metadata(dense, layout.folding.sizes).items():
        kind = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.FLOAT32
        writer.add_key_value(f"{layout.graph.name}.{key}", value, kind)


def gguf_context(features: Features) -> int:
    """The context that the file promises: no longer than a sliding window, which these graphs of llama.cpp lack."""
    return min(features.context_length, features.window or features.context_length)


def _add_rope(writer: GGUFWriter, features: Features) -> None:
    writer.add_rope_dimension_count(features.head_dim)
    writer.add_rope_freq_base(features.rope_theta)
    if features.rope_type == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(features.rope["factor"]))
