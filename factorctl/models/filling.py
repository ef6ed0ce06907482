"""Giving an empty model the tensors of a directory, every one accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from factorctl.checkpoint.reader import COMPUTED, CheckpointReader
from factorctl.errors import IntegrityError, UsageError, in_one_line
from factorctl.models.linears import use_few_token_linears


def adopt_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Take the defaults of `generate()` from the directory, where it has any.

    Raises:
        IntegrityError: the file is damaged.
    """
    if not (directory / "generation_config.json").is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except Exception as error:  # transformers checks it with exceptions of many types
        raise IntegrityError(
            f"{directory / 'generation_config.json'} cannot be read: {in_one_line(error)}", "fetch or make it again"
        ) from error


def fill(
    model: PreTrainedModel, reader: CheckpointReader, *, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Give an empty model the reader's tensors; every one must be expected, every expected one be there.

    Raises:
        IntegrityError: naming the first tensor that is missing, unexpected or misshaped.
    """
    state = {}
    floats = {entry.dtype for entry in reader.entries.values() if entry.dtype.is_floating_point}
    if dtype is None and len(floats) > 1:  # products of two dtypes are none: all take that of the matrices
        dtype = reader.matrix_dtype
    for name in stored_tensors(model, reader):
        tensor = reader.read(name)
        state[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    adopt(model, state, device)


def adopt(model: PreTrainedModel, state: Mapping[str, torch.Tensor], device: torch.device | str) -> None:
    """Make tensors that were checked by `check_names`, and lie on `device`, the weights of an empty model."""
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    use_few_token_linears(model)
    model.to(torch.device(device))  # type: ignore[arg-type]  # buffers that no checkpoint holds, e.g. rotary frequencies
    model.requires_grad_(False)
    model.eval()
    model.config.dtype = next(model.parameters()).dtype


def stored_tensors(model: PreTrainedModel, reader: CheckpointReader) -> list[str]:
    """The tensors of `reader` that make up `model`: all of them, but for what old writers stored on top.

    That is rotary frequencies, which are computed, and a copy of tied embeddings as `lm_head.weight`.

    Raises:
        IntegrityError: naming the first tensor that is missing, unexpected or misshaped.
    """
    expected = expected_tensors(model)
    found = {name: entry.shape for name, entry in reader.entries.items() if not _is_surplus(name, expected)}
    _refuse_other_head(model, expected, found, reader.directory)
    check_names(expected, found, reader.directory)
    return sorted(found)


def _refuse_other_head(
    model: PreTrainedModel, expected: Mapping[str, object], found: Mapping[str, object], directory: Path
) -> None:
    """Say of a checkpoint what it is, where only its head is not that of a language model.

    Raises:
        UsageError: a classifier, a reward model, or a base model saved without its head.
    """
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    stated = model.config.architectures
    named = ", ".join(map(str, stated)) if isinstance(stated, list) else ""
    of_layers = {name for name in missing | surplus if name.startswith("model.")}
    if of_layers or not missing <= {"lm_head.weight"}:
        return
    if surplus and (missing or (named and "CausalLM" not in named)):
        what = f"a {named}" if named and "CausalLM" not in named else "a model with another head"
        raise UsageError(
            f"{directory} holds {what}, no causal language model: it has tensor {min(surplus)}",
            "give the language model that it was made from",
        )
    if missing and not surplus:
        raise UsageError(
            f"{directory} lacks lm_head.weight and does not tie it to the embeddings: it was saved without its head, "
            "as AutoModel does",
            "save it from AutoModelForCausalLM, or set tie_word_embeddings in its config.json if the head is tied",
        )


def _is_surplus(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    return name.endswith(COMPUTED) or (name == "lm_head.weight" and name not in expected)


def expected_tensors(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a checkpoint of this model must hold; tied weights stand once."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def check_names(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    """Compare names and shapes.

    Raises:
        IntegrityError: naming the first difference.
    """
    if missing := sorted(expected.keys() - found.keys()):
        raise IntegrityError(
            f"{directory} lacks tensor {missing[0]} ({len(missing)} missing)", "fetch or make it again"
        )
    if unexpected := sorted(found.keys() - expected.keys()):
        raise IntegrityError(f"{directory} holds tensor {unexpected[0]}, which its config has no place for")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise IntegrityError(f"{directory}: tensor {name} has shape {tuple(found[name])}; its config says {shape}")
