"""Fidelity, other choices than the router's, and skipped FFN blocks, each where the answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from support.tiny import calibrated, factorize_quietly, some_ids

import factorctl
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.evaluation.ffn_skipping import SkipState, _greed, calibrate_threshold, skipping_ffns
from factorctl.evaluation.fidelity import LayerFidelity, Teacher, draw_fidelity, measure_fidelity
from factorctl.evaluation.routing_overrides import OracleChoice, RandomChoice, choosing
from factorctl.ffn.dense import dense_output
from factorctl.models.building import factored_ffns
from factorctl.models.families import read_dense_model
from factorctl.models.loading import load_dense
from factorctl.progress import SilentProgress


def teachers(source: Path):  # type: ignore[no-untyped-def]
    dense, reader = read_dense_model(source), CheckpointReader(source)

    def of(layer: int) -> Teacher:
        ffn = dense.read_ffn(layer, reader.read)
        return lambda x_TD: dense_output(ffn, dense.activation, x_TD)

    return of


def measured(model: torch.nn.Module, source: Path) -> list[LayerFidelity]:
    return measure_fidelity(model, some_ids(rows=4, length=32), teachers(source), SilentProgress())  # type: ignore[arg-type]


def test_all_experts_on_are_the_dense_ffn(checkpoint: Path, dense_source: DenseSource) -> None:
    layers = measured(factorctl.load(checkpoint, top_k=4), dense_source())
    assert [layer.layer for layer in layers] == [0, 1]
    for layer in layers:
        assert layer.relative_error < 1e-5
        assert layer.median_error < 1e-5
        assert (layer.agreement, layer.load, layer.load_entropy, layer.dead_experts) == (None, [], None, [])


@torch.no_grad()
def test_fidelity_is_that_of_a_plain_loop_on_the_models_own_stream(checkpoint: Path, dense_source: DenseSource) -> None:
    model, of = factorctl.load(checkpoint), teachers(dense_source())
    inputs: list[torch.Tensor] = []
    for ffn in factored_ffns(model):
        ffn.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))
    layers = measured(model, dense_source())
    for layer, ffn, x_TD in zip(layers, factored_ffns(model), inputs, strict=False):
        t_TD = of(layer.layer)(x_TD)
        errors, hits, load = [], 0, [0] * 4
        wrong = right = 0.0
        for x, t in zip(x_TD, t_TD, strict=True):
            y = ffn(x[None])[0]
            wrong, right = wrong + float((y - t).square().sum()), right + float(t.square().sum())
            errors.append(float((y - t).norm() / t.norm()))
            hidden = [ffn.activation(g[:12] @ x) * (g[12:] @ x) for g in ffn.gate_up]
            outputs = [ffn.down[:, 12 * e : 12 * (e + 1)] @ h for e, h in enumerate(hidden)]
            labels = torch.tensor([float((o - t).square().sum()) for o in outputs]).argsort()[:2].tolist()
            chosen = (ffn.router @ x).topk(2).indices.tolist()
            hits += len(set(labels) & set(chosen))
            for expert in chosen:
                load[expert] += 1
        tokens = len(x_TD)
        assert layer.relative_error == pytest.approx((wrong / right) ** 0.5, rel=1e-4)
        assert layer.median_error == pytest.approx(sorted(errors)[(tokens - 1) // 2], rel=1e-4)
        assert layer.agreement == pytest.approx(hits / (2 * tokens), abs=2 / tokens)
        assert layer.load == pytest.approx([count / tokens for count in load], abs=1e-6)
        assert sum(layer.load) == pytest.approx(2)
        assert layer.load_entropy is not None
        assert 0 < layer.load_entropy <= 1


def test_an_expert_that_nobody_chooses_is_dead(checkpoint: Path, dense_source: DenseSource) -> None:
    model = factorctl.load(checkpoint)
    for ffn in factored_ffns(model):
        ffn.router.zero_()  # ties: the same two experts for every token
    for layer in measured(model, dense_source()):
        assert len(layer.dead_experts) == 2
        assert layer.load_entropy == pytest.approx(0.5, abs=1e-5)
        assert layer.router_entropy == pytest.approx(1.0, abs=1e-5)


def test_the_picture_is_a_png_also_where_nothing_is_routed(checkpoint: Path, dense_source: DenseSource) -> None:
    routed = measured(factorctl.load(checkpoint), dense_source())
    unrouted = measured(factorctl.load(checkpoint, top_k=4), dense_source())
    for layers, chance in ((routed, 0.5), (unrouted, None)):
        assert draw_fidelity(layers, title="tiny", chance=chance).startswith(b"\x89PNG")


@torch.no_grad()
def test_only_the_choice_is_exchanged(checkpoint: Path) -> None:
    model, ids = factorctl.load(checkpoint), some_ids()
    routed = model(ids).logits
    with choosing(model, lambda _, ffn: lambda x_TD: ffn.router_logits(x_TD).topk(2).indices):
        torch.testing.assert_close(model(ids).logits, routed)
    with choosing(model, lambda _, ffn: lambda x_TD: ffn.router_logits(x_TD).topk(2, largest=False).indices):
        assert not torch.allclose(model(ids).logits, routed, atol=1e-3)
    assert torch.equal(model(ids).logits, routed), "the routers choose again"


def test_random_choices_are_even_distinct_and_repeatable(checkpoint: Path) -> None:
    ffn = next(factored_ffns(factorctl.load(checkpoint)))
    choice, x_TD = RandomChoice(ffn, seed=1, layer=0), torch.zeros(4000, 32)
    first = choice(x_TD)
    assert all(len(set(row)) == 2 for row in first.tolist())
    share = torch.bincount(first.flatten(), minlength=4) / 4000
    assert share.tolist() == pytest.approx([0.5] * 4, abs=0.04)
    assert not torch.equal(choice(x_TD), first)
    choice.restart()
    assert torch.equal(choice(x_TD), first)
    assert not torch.equal(RandomChoice(ffn, seed=1, layer=1)(x_TD), first)


@torch.no_grad()
def test_the_oracle_chooses_the_experts_nearest_to_their_part(
    dense_source: DenseSource, text_file: Path, tmp_path: Path
) -> None:
    """With shared neurons, biases and a fitted scale; K = 1, where the nearest expert is the best one alone."""
    source = dense_source("llama-biases")
    factorize_quietly(calibrated(source, tmp_path / "made", text_file, top_k=1, scale="sum", refit=False))
    model = factorctl.load(tmp_path / "made")
    ffn, teacher = next(factored_ffns(model)), teachers(source)(0)
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    chosen = OracleChoice(ffn, teacher)(x_TD)[:, 0]
    t_TD = teacher(x_TD)
    errors = []
    for expert in range(4):
        ffn.chooser = lambda x, e=expert: torch.full((len(x), 1), e)  # type: ignore[misc]
        errors.append((ffn(x_TD) - t_TD).square().sum(1))
    assert torch.equal(torch.stack(errors).argmin(0), chosen)


@pytest.mark.parametrize("case", ["llama", "gemma2"])
@torch.no_grad()
def test_nothing_is_skipped_until_a_threshold_is_set(case: str, dense_source: DenseSource) -> None:
    model, ids = load_dense(dense_source(case, num_hidden_layers=6)), some_ids()
    whole = model(ids).logits
    with skipping_ffns(model, post_ffn_norm=case == "gemma2") as state:
        assert torch.allclose(model(ids).logits, whole, atol=1e-5)
        assert state.share_run == 1.0
        state.threshold = -1.0
        state.restart()
        skipped = model(ids).logits
        tokens = ids.numel()
        rows = ids.shape[0]
        # cold: the first and the last layer; of the four in the middle every token but the first runs the first,
        # skips two and runs the fourth
        assert state.blocks_run == 4 * (tokens - rows) + 6 * rows
        assert state.share_run == state.blocks_run / (6 * tokens)
    assert not torch.allclose(skipped[:, 1:], whole[:, 1:], atol=1e-3)
    assert torch.allclose(skipped[:, 0], whole[:, 0], atol=1e-5), "the first position skips nothing"
    assert torch.equal(model(ids).logits, whole), "the FFNs are back in their places"


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
def test_the_threshold_is_calibrated_to_the_share_that_runs(share: float, dense_source: DenseSource) -> None:
    model, ids = load_dense(dense_source(num_hidden_layers=8)), some_ids(rows=8, length=48)
    with skipping_ffns(model, post_ffn_norm=False) as state:
        found = calibrate_threshold(model, state, ids, share)
        assert found == pytest.approx(share, abs=0.01)
        assert state.blocks_seen == 0, "calibration is not counted"
        with torch.no_grad():
            model(ids)
        assert state.share_run == pytest.approx(found, abs=1e-3), "what skipping does to later layers is counted in"


def test_a_share_below_what_always_runs_gives_the_least(dense_source: DenseSource) -> None:
    model, ids = load_dense(dense_source(num_hidden_layers=8)), some_ids(rows=4, length=32)
    with skipping_ffns(model, post_ffn_norm=False) as state:
        found = calibrate_threshold(model, state, ids, 0.1)
    assert 3 / 8 <= found < 0.5


@torch.no_grad()
def test_a_saturated_token_skips_two_blocks_and_is_asked_again(dense_source: DenseSource) -> None:
    model, ids = load_dense(dense_source(num_hidden_layers=9)), some_ids(rows=1, length=12)
    for layer in (1, 4):  # what these add is nothing, so no token turns there
        model.model.layers[layer].mlp.down_proj.weight.zero_()
    ran = []
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda _, x, at=layer: ran.append((at, x[0].shape[0])))
    with skipping_ffns(model, post_ffn_norm=False) as state:
        state.threshold = 1 - 1e-6
        model(ids)
    # 1 runs, 2 and 3 are skipped, 4 runs, 5 and 6 are skipped, 7 runs: but for the first position, which skips nothing
    assert dict(ran) == {0: 12, 1: 12, 2: 1, 3: 1, 4: 12, 5: 1, 6: 1, 7: 12, 8: 12}


@pytest.mark.parametrize(("share", "greed"), [(0.75, 2), (0.5, 2), (0.35, 5), (0.1, 24)])
def test_more_blocks_are_skipped_at_once_where_two_would_not_do(share: float, greed: int) -> None:
    assert _greed(SkipState(cold=3, num_layers=30), share) == greed


def test_a_model_without_middle_layers_skips_nothing(dense_source: DenseSource) -> None:
    model = load_dense(dense_source())
    with skipping_ffns(model, post_ffn_norm=False) as state:
        assert calibrate_threshold(model, state, some_ids(), 0.5) == 1.0
