"""The dense model run one decoder layer at a time over a fixed set of token blocks.

Only one layer's weights are in memory. What a layer needs besides its input (masks, rotary embeddings, per layer type
where a family has several) is recorded once by sending the embeddings through a model whose layers only take notes;
so any family that transformers runs, runs here, without knowledge of its attention.

B blocks of L tokens; T = B*L; D hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.models.building import decoder_layers, empty_dense_model
from factorctl.models.families import DenseModel, layer_prefix

BATCH_TOKENS = 4096
"""Tokens that pass through a layer at a time."""


class LayerwiseModel:
    """A dense model whose decoder layers are loaded, run and dropped one after the other, in float32.

    Args:
        ids_BL: token ids of the calibration blocks.
    """

    def __init__(self, dense: DenseModel, reader: CheckpointReader, ids_BL: torch.Tensor, device: torch.device) -> None:
        self.dense, self.reader, self.device = dense, reader, device
        self.ids_BL = ids_BL
        self.batch_blocks = max(1, BATCH_TOKENS // ids_BL.shape[1])
        self._model = empty_dense_model(dense)
        self._layer_arguments: dict[int, list[dict[str, Any]]] = {}

    def embed(self) -> torch.Tensor:
        """The input of the first layer, [B, L, D]; also records what each layer is called with."""
        embedding, layers = self._model.model.embed_tokens, decoder_layers(self._model)
        self._fill(embedding, "model.embed_tokens.")
        self._model.model.rotary_emb.to(self.device)
        hidden = []
        for batch_ids in self.ids_BL.split(self.batch_blocks):
            notes = [_NoteTaker(layer, is_last=layer is layers[-1]) for layer in layers]
            self._model.model.layers = nn.ModuleList(notes)
            try:
                self._model.model(input_ids=batch_ids.to(self.device), use_cache=False)
            except _EndOfLayers:
                pass
            finally:
                self._model.model.layers = layers
            hidden.append(notes[0].hidden)
            self._layer_arguments.setdefault(len(batch_ids), [note.arguments for note in notes])
        embedding.to("meta")
        return torch.cat(hidden)

    def load_layer(self, layer: int) -> nn.Module:
        """Decoder layer with its weights in float32, but for its FFN's; release it with `drop_layer`."""
        module = decoder_layers(self._model)[layer]
        module.mlp = nn.Identity()
        self._fill(module, layer_prefix(layer))
        return module

    def drop_layer(self, layer: int) -> None:
        decoder_layers(self._model)[layer].to("meta")

    def run_attention(self, layer: int, hidden_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream after attention [B, L, D], FFN input [T, D]): the layer up to its FFN."""
        module = decoder_layers(self._model)[layer]
        inputs: list[torch.Tensor] = []
        module.mlp = _ZeroFFN(inputs)
        residual_BLD = self._run(module, layer, hidden_BLD)  # + 0: the FFN adds nothing, also behind a norm
        return residual_BLD, torch.cat(inputs)

    def add_ffn(self, layer: int, residual_BLD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
        """The layer's output when its FFN gave `y_TD`."""
        if self.dense.family.post_ffn_norm:
            y_TD = decoder_layers(self._model)[layer].get_submodule("post_feedforward_layernorm")(y_TD)
        return residual_BLD + y_TD.view_as(residual_BLD)

    def _run(self, module: nn.Module, layer: int, hidden_BLD: torch.Tensor) -> torch.Tensor:
        outputs = []
        for batch in hidden_BLD.split(self.batch_blocks):
            output = module(batch, **self._layer_arguments[len(batch)][layer])
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat(outputs)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        state = {name: self.reader.read(prefix + name).float().to(self.device) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)


class _EndOfLayers(Exception):
    """Raised by the last note taker: the final norm and the head are not needed."""


class _NoteTaker(nn.Module):
    """Stands in for a decoder layer and records what it is called with."""

    def __init__(self, layer: nn.Module, *, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.__dict__["stood_in_for"] = layer  # not registered: its meta parameters are not ours

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(
                self.__dict__["stood_in_for"], name
            )  # e.g. attention_type, which models ask their layers for

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden_states, {**arguments, "use_cache": False, "past_key_values": None}
        if self.is_last:
            raise _EndOfLayers
        return hidden_states


class _ZeroFFN(nn.Module):
    """Records its inputs and returns zeros."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.inputs = inputs

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.inputs.append(hidden_states.flatten(0, 1))
        return torch.zeros_like(hidden_states)
