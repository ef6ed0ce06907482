"""Training states on disk: what a killed run needs to go on as if it had not been killed.

    RUN/run.json                       what the run is: a resumed one must be the same
    RUN/metrics.jsonl                  one line per step
    RUN/state-00000120/state.json      step, tokens, scalars, and the sha256 of every file beside it
    RUN/state-00000120/layer-*.safetensors   trained values, optimiser state and more of one decoder layer

A state is written into a partial sibling and renamed when it is whole; older ones are removed only then. It holds no
random state, because a step draws no random numbers: the order of the data is a function of seed and step.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.writer import write_shard
from factorctl.errors import IntegrityError
from factorctl.files.hashing import FileRecord, hash_file
from factorctl.files.publishing import partial_path, publish_directory, writable, write_file
from factorctl.files.strict_json import dump_sealed, read_sealed
from factorctl.training.sharding import all_gathered, placed_like

STATE_FILE = "state.json"
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_STATE_NAME = re.compile(r"state-\d{8}")
_DAMAGED = "remove that directory to go on from an older state, or start over with --overwrite"


@dataclass(frozen=True)
class Progressed:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What the run found out once and need not measure again."""


def state_path(run: Path, step: int) -> Path:
    return run / f"state-{step:08d}"


def newest_state(run: Path) -> Path | None:
    """The last complete state of a run; partial ones have other names."""
    found = sorted(path for path in run.glob("state-*") if _STATE_NAME.fullmatch(path.name))
    return found[-1] if found else None


def incomplete_states(run: Path) -> list[str]:
    """Names of the states that a killed run was writing."""
    return sorted(path.name.split(".")[1] for path in run.glob(".state-*.partial"))


def save_state(
    run: Path,
    progressed: Progressed,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    *,
    writes: bool = True,
) -> Path:
    """Write a complete state, then remove older ones. Every process calls it; the one that `writes` does.

    Raises:
        ResourceError: the disk is full; the older state is still there.
    """
    final = state_path(run, progressed.step)
    partial = partial_path(final)
    if writes:
        with writable(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    files: dict[str, FileRecord] = {}
    scalars: dict[str, dict[str, float]] = {}
    states = _optimizer_states(optimizers)
    for layer, names in _by_layer(model).items():
        tensors, numbers = _layer_content(names, states)
        scalars |= numbers
        if writes:
            name = f"layer-{layer:05d}.safetensors"
            files[name] = write_shard(partial / name, tensors)
    if writes:
        record = {
            "step": progressed.step,
            "tokens": progressed.tokens,
            "notes": dict(progressed.notes),
            "scalars": scalars,
            "files": {name: asdict(file) for name, file in files.items()},
        }
        write_file(partial / STATE_FILE, dump_sealed(record))
        publish_directory(partial, final)
        remove_states(run, keep=final)
    return final


def remove_states(run: Path, keep: Path | None = None) -> None:
    """Remove every state but `keep`, and what killed saves left behind."""
    for path in run.iterdir():
        if path != keep and _STATE_NAME.match(path.name.lstrip(".")):
            shutil.rmtree(path, ignore_errors=True)


def restore_state(path: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Progressed:
    """Put a saved state into model and optimisers, every value accounted for.

    Raises:
        IntegrityError: a file is not what was written, or does not fit this model.
    """
    record = read_record(path)
    states = _optimizer_states(optimizers)
    parameters = {name: p for names in _by_layer(model).values() for name, p in names.items()}
    for name, file in record["files"].items():
        if not (path / name).is_file() or asdict(hash_file(path / name)) != file:
            raise IntegrityError(f"{path / name} is not what was saved", _DAMAGED)
        reader = CheckpointReader.of_file(path / name)
        for key in reader.entries:
            _restore_tensor(key, reader.read(key), parameters, states, path)
    for name, numbers in record["scalars"].items():
        states[parameters[name]].update({key: int(value) for key, value in numbers.items()})
    return Progressed(record["step"], record["tokens"], record["notes"])


def read_record(path: Path) -> dict[str, Any]:
    """The content of a state's state.json.

    Raises:
        IntegrityError: it is not what was written.
    """
    try:
        return read_sealed(path / STATE_FILE)
    except IntegrityError as error:
        raise IntegrityError(error.message, _DAMAGED) from None


def _restore_tensor(
    key: str,
    tensor: torch.Tensor,
    parameters: Mapping[str, torch.Tensor],
    states: Mapping[torch.Tensor, dict[str, Any]],
    origin: Path,
) -> None:
    kind, name, *slot = key.split("/")
    parameter = parameters.get(name)
    if parameter is None or (kind == "value" and tensor.shape != parameter.shape):
        raise IntegrityError(f"{origin} holds {key}, which this model has no place for", _DAMAGED)
    if kind == "value":
        with torch.no_grad():
            parameter.copy_(placed_like(tensor, parameter))
    else:
        # Adam's step count lives on the CPU whatever the device; what belongs to each value lies beside the value.
        states[parameter][slot[0]] = tensor if tensor.dim() == 0 else placed_like(tensor, parameter)


def _optimizer_states(optimizers: Iterable[torch.optim.Optimizer]) -> dict[torch.Tensor, dict[str, Any]]:
    """The live state dictionary of every parameter that some optimiser holds."""
    states: dict[torch.Tensor, dict[str, Any]] = {}
    for wrapped in optimizers:
        optimizer = getattr(wrapped, "optimizer", wrapped)  # accelerate wraps optimisers
        for group in optimizer.param_groups:
            states |= {parameter: optimizer.state[parameter] for parameter in group["params"]}
    return states


def _by_layer(model: nn.Module) -> dict[int, dict[str, torch.Tensor]]:
    """What a run changes, by name, by decoder layer: trained parameters, what was set once and kept of a layer's
    selection, and what layers have collected for the next refresh of their routers."""
    kept = (".sharpness", ".reach")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad or name.endswith(kept)}
    collected = {name: buffer for name, buffer in model.named_buffers() if ".moments." in name}
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in {**found, **collected}.items():
        match = _LAYER.search(name)
        assert match, f"{name} is trained and lies in no decoder layer"
        layers.setdefault(int(match[1]), {})[name] = tensor
    return layers


def _layer_content(
    parameters: Mapping[str, torch.Tensor], states: Mapping[torch.Tensor, Mapping[str, Any]]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = all_gathered(parameter.detach())
        for slot, value in states.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{name}/{slot}"] = all_gathered(value)
            else:
                scalars.setdefault(name, {})[slot] = value
    # Two names of one tensor (8-bit AdamW's shared quantisation map) are two tensors on disk.
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()}, scalars
