"""The calibration tokens on their way through a model that is being factored under them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from factorctl.calibration.closed_form import Tokens
from factorctl.calibration.statistics import StatsCollector, token_sample, token_weights
from factorctl.calibration.stream import LayerwiseModel
from factorctl.contracts import LayerStats, Stat
from factorctl.models.dense_ffn import cast_ffn
from factorctl.models.factored_ffn import FactoredFFN


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
    """Inputs, targets and weights of the layer that was entered last."""

    def __post_init__(self) -> None:
        with torch.no_grad():
            self._hidden_BLD = self.model.embed()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def enter(self, layer: int) -> None:
        """Run the layer up to its FFN, and its dense FFN for the targets."""
        self.model.load_layer(layer)
        self._hidden_BLD, x_TD = self.model.run_attention(layer, self._hidden_BLD)
        t_TD = self.model.dense_ffn(layer, x_TD)
        behind_BLD = self.model.add_ffn(layer, self._hidden_BLD, t_TD)
        self.tokens = Tokens(x_TD, t_TD, token_weights(behind_BLD.flatten(0, 1)))

    def statistics(self, layer: int, needs: frozenset[Stat]) -> LayerStats:
        """What the layer's neurons do on the stream, and what they see."""
        stats, counted = LayerStats(tokens=len(self.tokens.x_TD)), needs - {Stat.TOKENS}
        activation = self.model.dense.activation
        if counted:
            ffn = cast_ffn(self.model.dense.read_ffn(layer, self.model.reader.read), torch.float32, self.device)
            collector = StatsCollector(ffn, activation, needs=counted, tokens=stats.tokens)
            for x_TD, _, weight_T1 in self.tokens.chunks():
                collector.add(x_TD, weight_T1.squeeze(1))
            stats = collector.result()
        if Stat.TOKENS in needs:
            stats = replace(stats, sample=token_sample(self.tokens.x_TD, self.tokens.weight_T, activation))
        return stats

    def leave(self, layer: int, ffn: FactoredFFN | None) -> None:
        """Go on behind the layer, with the factored FFN's output if the stream is compressed, and release it."""
        y_TD = self.tokens.t_TD
        if ffn is not None and self.compressed:
            y_TD = torch.cat([ffn(x_TD) for x_TD, _, _ in self.tokens.chunks()])
        self._hidden_BLD = self.model.add_ffn(layer, self._hidden_BLD, y_TD)
        self.model.drop_layer(layer)
        del self.tokens
