"""Loading an export whose routed experts bitsandbytes quantised: the stock model class, experts quantised in memory.

Stock `from_pretrained` cannot: transformers quantises `nn.Linear` and nothing else, and the experts are fused
parameters. So the stock class is built without memory here and filled, every tensor accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.errors import IntegrityError, in_one_line
from factorctl.ffn.paths import can_group
from factorctl.files.strict_json import read_json_object
from factorctl.models.filling import adopt, adopt_generation_config, check_names, expected_tensors
from factorctl.models.quantised.storage import Bits, bits_of, is_fused, is_quantised, quantised, scales_name
from factorctl.models.quantised.weights import EightBit, FourBit, dequantise_once_per_pass, four_bit, hold


def load_quantised(
    directory: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A stock mixture of experts from `--to bnb-4bit` or `--to bnb-8bit`, for inference; `generate()` works.

    Embeddings, norms, routers and head are `dtype`, the stored one by default; so is what the experts are dequantised
    to, layer by layer and only while the layer runs.

    Raises:
        IntegrityError: a tensor is damaged, missing, unexpected or misshaped, or config.json describes no such model.
    """
    raw = read_json_object(directory / "config.json")
    bits = bits_of(raw)
    if bits is None:
        raise IntegrityError(f"{directory / 'config.json'} names no quantised experts", "make the export again")
    model = _empty_model(directory)
    reader = CheckpointReader(directory)
    expected = expected_tensors(model)
    _check_stored(expected, bits, reader)
    cast = dtype or reader.entry("model.embed_tokens.weight").dtype
    plain = {name: reader.read(name).to(device, cast) for name in expected if not is_quantised(name)}
    for name in filter(is_quantised, expected):
        parts = {part: reader.read(part).to(device) for part in _parts(name, expected[name], bits)}
        _hold(model, name, parts, cast)
    for path in {name.rpartition(".")[0] for name in expected if is_fused(name)}:
        dequantise_once_per_pass(model.get_submodule(path))
    _avoid_unaligned_experts(model, expected, cast)
    adopt(model, plain, device)
    adopt_generation_config(model, directory)
    # As transformers marks such a model: it then refuses `model.to(dtype)`, which would round the scales.
    vars(model).update(is_quantized=True, quantization_method=QuantizationMethod.BITS_AND_BYTES)
    return model


def dequantised(name: str, shape: torch.Size, bits: Bits, reader: CheckpointReader) -> torch.Tensor:
    """One quantised weight in float32, as the loaded model computes it.

    Raises:
        IntegrityError: a part is missing or the state is that of another weight.
    """
    parts = {part: reader.read(part) for part in _parts(name, shape, bits)}
    codes = parts.pop(name)
    return _dequantiser(name, shape, parts, torch.float32)(codes)  # type: ignore[no-any-return]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers: codes, their scales, and what is kept in full precision."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _empty_model(directory: Path) -> PreTrainedModel:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers finds contradictions anywhere on the way
        raise IntegrityError(
            f"{directory / 'config.json'} describes no model that can be built: {in_one_line(error)}",
            "make the export again",
        ) from error
    model.eval()
    return model


def _parts(name: str, shape: tuple[int, ...], bits: Bits) -> dict[str, torch.Tensor]:
    """What stands on disk for one quantised weight, without values."""
    return quantised(name, torch.empty(shape, device="meta"), bits)


def _check_stored(expected: Mapping[str, tuple[int, ...]], bits: Bits, reader: CheckpointReader) -> None:
    """Compare names, shapes and the types of codes and scales on disk with what the model needs.

    Raises:
        IntegrityError: naming the first difference.
    """
    found = {name: entry.shape for name, entry in reader.entries.items()}
    parts = {
        part: tensor
        for name, shape in expected.items()
        if is_quantised(name)
        for part, tensor in _parts(name, shape, bits).items()
    }
    shapes = {name: shape for name, shape in expected.items() if not is_quantised(name)}
    for part, tensor in parts.items():  # the quantisation state is JSON, of any length
        shapes[part] = found.get(part, ()) if ".quant_state." in part else tuple(tensor.shape)
    check_names(shapes, found, reader.directory)
    for part, tensor in parts.items():
        if (stored := reader.entry(part).dtype) != tensor.dtype:
            raise IntegrityError(f"{reader.directory}: tensor {part} is {stored}; expected is {tensor.dtype}")


def _hold(model: PreTrainedModel, name: str, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give the model one quantised weight."""
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    shape, codes = getattr(module, parameter).shape, parts.pop(name)
    hold(module, parameter, codes, _dequantiser(name, shape, parts, dtype))


def _dequantiser(
    name: str, shape: torch.Size, beside: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> FourBit | EightBit:
    scales = beside.get(scales_name(name))
    return four_bit(beside, name, shape, dtype) if scales is None else EightBit(scales, shape, dtype)


def _avoid_unaligned_experts(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """transformers' default for experts, `grouped_mm`, raises on rows of no multiple of 16 bytes."""
    sizes = {size for name, shape in shapes.items() if is_fused(name) for size in shape[1:]}
    if not can_group(dtype, *sizes):
        model.set_experts_implementation("eager")
