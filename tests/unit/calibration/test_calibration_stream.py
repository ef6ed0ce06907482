"""The dense model run layer by layer is the dense model, in every family; statistics against plain loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from support.tiny import CASES, some_ids

from factorctl.calibration.compressed_stream import CalibrationStream
from factorctl.calibration.statistics import StatsCollector, most_active, token_weights
from factorctl.calibration.stream import LayerwiseModel
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.contracts import PATTERN_TOKENS, DenseFFN, Stat
from factorctl.ffn import ridge
from factorctl.ffn.dense import dense_hidden
from factorctl.ffn.ridge import RidgeMoments
from factorctl.models.families import read_dense_model
from factorctl.models.loading import load_dense

CPU = torch.device("cpu")


def layerwise(source: Path, ids_BL: torch.Tensor) -> LayerwiseModel:
    return LayerwiseModel(read_dense_model(source), CheckpointReader(source), ids_BL, CPU)


@pytest.mark.parametrize(("batch_tokens", "hidden_bytes"), [(4096, 1 << 30), (48, 0)])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_stream_is_the_dense_model(
    case: str, batch_tokens: int, hidden_bytes: int, dense_source: DenseSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factorctl.calibration.stream.BATCH_TOKENS", batch_tokens)
    source, ids_BL = dense_source(case), some_ids(rows=3, length=24)
    model = load_dense(source)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _, x, y: inputs.append(x[0]))
        block.mlp.register_forward_hook(lambda _, x, y: outputs.append(y))
    hidden = model(ids_BL, output_hidden_states=True).hidden_states
    monkeypatch.setattr("factorctl.calibration.compressed_stream.HIDDEN_BYTES", hidden_bytes)
    stream = CalibrationStream(layerwise(source, ids_BL), compressed=False)
    dense, reader = stream.model.dense, stream.model.reader
    for layer in range(len(model.model.layers)):
        assert torch.allclose(stream._hidden_BLD, hidden[layer], atol=1e-4)
        ffn = dense.read_ffn(layer, reader.read)
        stream.enter(layer, ffn, ffn)
        assert (stream.tokens.hidden_TF is None) == (hidden_bytes == 0)
        assert torch.allclose(stream.tokens.x_TD, inputs[layer].flatten(0, 1), atol=1e-4)
        assert torch.allclose(stream.tokens.t_TD, outputs[layer].flatten(0, 1), atol=1e-4)
        stream.leave(layer, None)
    assert torch.allclose(model.model.norm(stream._hidden_BLD), hidden[-1], atol=1e-4)


@torch.no_grad()
def test_one_layer_at_a_time_is_in_memory(dense_source: DenseSource) -> None:
    model = layerwise(dense_source(), some_ids())
    model.embed()
    assert all(parameter.is_meta for parameter in model._model.parameters())
    layer = model.load_layer(1)
    assert not any(parameter.is_meta for parameter in layer.parameters()), "its FFN is read by who factors it"
    assert all(parameter.is_meta for parameter in model._model.model.layers[0].parameters())
    model.drop_layer(1)
    assert all(parameter.is_meta for parameter in model._model.parameters())


def random_ffn(hidden: int = 6, neurons: int = 20) -> DenseFFN:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return DenseFFN(draw(neurons, hidden), draw(neurons, hidden), draw(hidden, neurons), draw(neurons), draw(neurons))


def test_statistics_against_a_plain_loop() -> None:
    ffn, tokens = random_ffn(), 37
    x_TD, weight_T = torch.randn(tokens, 6), torch.rand(tokens)
    collector = StatsCollector(ffn, needs=frozenset(Stat), tokens=tokens)
    for rows in (slice(0, 10), slice(10, 11), slice(11, 37)):
        collector.add(dense_hidden(ffn, "silu", x_TD[rows]), weight_T[rows])
    stats = collector.result()
    squares, active = [0.0] * 20, [0] * 20
    patterns = []
    for x, weight in zip(x_TD.double(), weight_T.double(), strict=True):
        gate = ffn.gate_FD.double() @ x + ffn.gate_bias_F.double()
        h = gate / (1 + torch.exp(-gate)) * (ffn.up_FD.double() @ x + ffn.up_bias_F.double())
        top = sorted(range(20), key=lambda f: -abs(float(h[f])))[:2]
        patterns.append([f in top for f in range(20)])
        for f in range(20):
            squares[f] += float(weight) * float(h[f]) ** 2
            active[f] += f in top
    assert stats.tokens == tokens
    for f in range(20):
        norm = math.sqrt(sum(float(v) ** 2 for v in ffn.down_DF[:, f]))
        assert float(stats.importance_F[f]) == pytest.approx(math.sqrt(squares[f] / tokens) * norm, rel=1e-4)
        assert float(stats.rate_F[f]) == pytest.approx(active[f] / tokens)
    assert stats.patterns_PF.tolist() == patterns


def test_patterns_are_spread_evenly_and_bounded() -> None:
    ffn, tokens = random_ffn(), 3 * PATTERN_TOKENS
    x_TD = torch.randn(tokens, 6)
    collector = StatsCollector(ffn, needs=frozenset({Stat.PATTERNS}), tokens=tokens)
    hidden_TF = dense_hidden(ffn, "silu", x_TD)
    for rows in hidden_TF.split(1000):
        collector.add(rows, torch.ones(len(rows)))
    stats = collector.result()
    whole = StatsCollector(ffn, needs=frozenset({Stat.PATTERNS}), tokens=PATTERN_TOKENS)
    whole.add(hidden_TF[::3], torch.ones(PATTERN_TOKENS))
    assert stats.patterns_PF.shape == (PATTERN_TOKENS, 20)
    assert torch.equal(stats.patterns_PF, whole.result().patterns_PF)
    assert stats.rate_F is None


def test_a_tenth_is_active_and_at_least_one() -> None:
    assert most_active(torch.randn(5, 48)).sum(1).tolist() == [5] * 5
    assert most_active(torch.tensor([[0.0, -3.0, 2.0]])).tolist() == [[False, True, False]]


def test_token_weights_are_finite_also_for_a_stream_of_zeros() -> None:
    weights = token_weights(torch.cat([torch.zeros(1, 8), torch.randn(3, 8)]))
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()


@pytest.mark.parametrize("panel", [3, ridge.PANEL])
@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_ridge_against_the_normal_equations_in_float64(
    damping: float, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "PANEL", panel)
    x_TI, y_TO, around_IO = torch.randn(200, 7), torch.randn(200, 3), torch.randn(7, 3)
    moments = RidgeMoments(7, 3, CPU)
    for rows in (slice(0, 50), slice(50, 200)):
        moments.add(x_TI[rows], y_TO[rows])
    assert torch.allclose(moments.gram(), x_TI.T @ x_TI, atol=1e-4)
    assert torch.equal(moments.gram(), moments.gram().T)
    x, y, w0 = x_TI.double(), y_TO.double(), around_IO.double()
    pull = damping * (x.T @ x).diagonal().mean() * torch.eye(7, dtype=torch.float64)
    for start, wanted in ((None, torch.zeros(7, 3).double()), (around_IO, w0)):
        exact = torch.linalg.solve(x.T @ x + pull, x.T @ y + pull @ wanted)
        assert torch.allclose(moments.solve(damping, around_IO=start).double(), exact, atol=1e-4)


def test_ridge_with_inputs_that_never_fire_stays_finite() -> None:
    moments = RidgeMoments(4, 2, CPU)
    x_TI = torch.randn(50, 4)
    x_TI[:, 2] = 0
    x_TI[:, 3] = x_TI[:, 1]
    moments.add(x_TI, torch.randn(50, 2))
    assert torch.isfinite(moments.solve(0.0)).all()
    empty = RidgeMoments(4, 2, CPU)
    assert torch.equal(empty.solve(0.1), torch.zeros(4, 2))
