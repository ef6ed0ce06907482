"""A dense .gguf file as a Hugging Face directory: dequantised exactly once, cached by the file's hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from factorctl.checkpoint.hashing import hash_file
from factorctl.checkpoint.publishing import (
    discarded_on_failure,
    partial_path,
    publish_directory,
    require_disk_space,
    sole_writer,
    writable,
)
from factorctl.errors import IntegrityError, UsageError, in_one_line
from factorctl.progress import Progress


def dequantised(path: Path, *, cache: Path, progress: Progress) -> tuple[Path, str, str]:
    """(directory with float32 safetensors and tokenizer, sha256 of the GGUF, note for the user).

    Raises:
        UsageError: transformers cannot read this GGUF as a dense causal language model.
    """
    sha256 = hash_file(path).sha256
    quantisation = _quantisation(path)
    home = cache / "gguf" / sha256[:16]
    if not home.exists():  # a finished cache entry is used without a lock, also where it cannot be written
        with sole_writer(home, wait=True):
            if not home.exists():
                with progress.stage(f"Dequantising {path.name} ({quantisation}) to float32"):
                    _convert(path, home)
    note = f"{path.name} holds {quantisation} weights: dequantised once to float32, kept in {home}"
    return home, sha256, note


def _quantisation(path: Path) -> str:
    """The names of the tensor types inside, most bytes first: 'Q4_1, F32'."""
    from gguf import GGUFReader

    try:
        sizes: dict[str, int] = {}
        for tensor in GGUFReader(path).tensors:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    except Exception as error:  # the reader trusts its offsets: a damaged file fails anywhere in it
        raise UsageError(f"{path} is no readable GGUF file: {in_one_line(error)}", "fetch the file again") from error
    return ", ".join(sorted(sizes, key=lambda name: -sizes[name]))


def _convert(path: Path, home: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    require_disk_space(home.parent, 8 * path.stat().st_size)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers' GGUF reader fails in many ways on what it does not know
        raise UsageError(
            f"transformers cannot read {path.name} as a dense model: {in_one_line(error)}",
            "give the model's Hugging Face directory instead",
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise IntegrityError(
            f"{path} lacks tensor {missing[0]} ({len(missing)} missing)",
            "a model split over several .gguf files must be merged first (llama-gguf-split --merge)",
        )
    model.config.__dict__.pop("quantization_config", None)  # some releases leave the GGUF's behind
    partial = partial_path(home)
    with writable(partial), discarded_on_failure(partial):
        model.save_pretrained(partial, max_shard_size="4GB")
        tokenizer.save_pretrained(partial)
        publish_directory(partial, home)
