"""The calibration tokens on their way through a model that is being factored under them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from factorctl.calibration.closed_form import output
from factorctl.calibration.statistics import StatsCollector, token_weights
from factorctl.calibration.stream import LayerwiseModel
from factorctl.calibration.tokens import CHUNK_TOKENS, HIDDEN_BYTES, Tokens
from factorctl.contracts import SAMPLE_TOKENS, DenseFFN, LayerStats, Stat, TokenSample
from factorctl.ffn.dense import cast_ffn, dense_hidden, dense_output
from factorctl.ffn.layer import FactoredFFN


@dataclass
class CalibrationStream:
    """Calibration tokens on their way through the model, layer by layer.

    Behind a layer the stream goes on with what the layer now gives. With `compressed` that is the factored FFN's
    output: every later layer is then fitted to the inputs that it will really see. Otherwise only statistics are
    wanted, and the stream stays the dense model's.

    The target of a layer is what its dense FFN gives on these very inputs. Aiming at the dense model's own output at
    the same position instead would ask the layer to mend what earlier layers broke, and least squares answers by
    shrinking.
    """

    model: LayerwiseModel
    compressed: bool
    _hidden_BLD: torch.Tensor = field(init=False)
    tokens: Tokens = field(init=False)
    """Of the layer that was entered last."""
    _stored: DenseFFN = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self._hidden_BLD = self.model.embed()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def residual_TD(self) -> torch.Tensor:
        """The residual stream behind the layer that was left last, tokens in order."""
        return self._hidden_BLD.flatten(0, 1)

    def enter(self, layer: int, source: DenseFFN, stored: DenseFFN) -> None:
        """Run the layer up to its FFN, and its dense FFN for the targets.

        Args:
            source: the dense FFN as the source holds it, which gives the targets.
            stored: the same values in the dtype in which they will be stored, which are what runs from here on.
        """
        self.model.load_layer(layer)
        self._hidden_BLD, x_TD = self.model.run_attention(layer, self._hidden_BLD)
        self._stored = cast_ffn(stored, torch.float32, self.device)
        kept = len(x_TD) * stored.intermediate_size * 4 <= HIDDEN_BYTES
        hidden_TF = self._activations(x_TD) if kept else None
        t_TD = self._targets(x_TD, hidden_TF if stored is source else None, source)
        behind_BLD = self.model.add_ffn(layer, self._hidden_BLD, t_TD)
        self.tokens = Tokens(x_TD, t_TD, token_weights(behind_BLD.flatten(0, 1)), hidden_TF)

    def statistics(self, needs: frozenset[Stat]) -> LayerStats:
        """What the layer's neurons do on the stream, and what they see."""
        stats, counted = LayerStats(tokens=len(self.tokens)), needs - {Stat.TOKENS}
        if counted:
            collector = StatsCollector(self._stored, needs=counted, tokens=stats.tokens)
            for chunk in self.tokens.chunks():
                hidden_TF = self._activations(chunk.x_TD) if chunk.hidden_TF is None else chunk.hidden_TF
                collector.add(hidden_TF, chunk.weight_T)
            stats = collector.result()
        return replace(stats, sample=self._sample()) if Stat.TOKENS in needs else stats

    def leave(self, layer: int, ffn: FactoredFFN | None) -> None:
        """Go on behind the layer, with the factored FFN's output if the stream is compressed, and release it."""
        y_TD = self.tokens.t_TD
        if ffn is not None and self.compressed:
            y_TD = torch.cat([output(ffn, chunk) for chunk in self.tokens.chunks()])
        self._hidden_BLD = self.model.add_ffn(layer, self._hidden_BLD, y_TD)
        self.model.drop_layer(layer)
        del self.tokens, self._stored

    def _activations(self, x_TD: torch.Tensor) -> torch.Tensor:
        activation = self.model.dense.activation
        return torch.cat([dense_hidden(self._stored, activation, x_CD) for x_CD in x_TD.split(CHUNK_TOKENS)])

    def _targets(self, x_TD: torch.Tensor, hidden_TF: torch.Tensor | None, source: DenseFFN) -> torch.Tensor:
        """The dense FFN's output, from its activations where they are at hand."""
        if hidden_TF is not None:
            return F.linear(hidden_TF, self._stored.down_DF, self._stored.down_bias_D)
        ffn, activation = cast_ffn(source, torch.float32, self.device), self.model.dense.activation
        return torch.cat([dense_output(ffn, activation, x_CD) for x_CD in x_TD.split(CHUNK_TOKENS)])

    def _sample(self) -> TokenSample:
        sample = self.tokens.spread(SAMPLE_TOKENS)
        hidden_TF = self._activations(sample.x_TD) if sample.hidden_TF is None else sample.hidden_TF
        return TokenSample(sample.x_TD, hidden_TF, sample.weight_T)
