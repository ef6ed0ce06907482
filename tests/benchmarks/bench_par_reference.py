"""What PAR's loss can fall to: a converged logistic regression of the teacher's labels on each layer's input.

    python tests/benchmarks/bench_par_reference.py runs/demo-1R8E3K+S384 --data train.jsonl.xz

Inputs are those of the student, labels the teacher's, as in training; text, held-out split and labels are the ones that
`finetune` with the same options would see. Prints held-out cross-entropy and agreement, mean over layers: of no router
(log N), of the checkpoint's own router at the best temperature, and of the regression.

T tokens, D hidden_size, N num_experts, K top_k.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from factorctl.cli.render import progress_listener
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.quantities import parse_token_count
from factorctl.pipeline.finetune.model import build_distiller, training_blocks
from factorctl.pipeline.finetune.plan import plan_finetune
from factorctl.training.batches import Batches
from factorctl.training.distiller import Distiller
from factorctl.training.losses import agreement, par_loss
from factorctl.training.twin_ffn import TwinFFN, twins

PENALTIES = (1e-2, 0.1, 1.0, 10.0)
"""Candidates for the pull of whitened weights to 0; an eighth of the training tokens chooses."""
ITERATIONS = 100
TEMPERATURES = [2.0**power for power in range(-12, 5)]


@dataclass(frozen=True)
class LayerExamples:
    """What one layer's router sees and should say."""

    x_TD: torch.Tensor
    labels_TK: torch.Tensor

    def split(self, first: int) -> tuple[LayerExamples, LayerExamples]:
        ahead, behind = slice(None, first), slice(first, None)
        return tuple(LayerExamples(self.x_TD[part], self.labels_TK[part]) for part in (ahead, behind))  # type: ignore


@dataclass(frozen=True)
class LayerResult:
    """Held-out, of one layer."""

    own_par: float
    own_agreement: float
    logistic_par: float
    logistic_agreement: float


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=parse_token_count, default=61_440)
    parser.add_argument("--heldout-tokens", type=parse_token_count, default=16_384)
    parser.add_argument("--block-length", type=int, default=1024)
    parser.add_argument("--preset", choices=["default", "factorllm"], default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


@torch.no_grad()
def collect(distiller: Distiller, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[LayerExamples]:
    """Every layer's inputs (bfloat16) and labels on some text."""
    layers = twins(distiller.model)
    seen: dict[TwinFFN, list[torch.Tensor]] = {twin: [] for twin in layers}
    labels: dict[TwinFFN, list[torch.Tensor]] = {twin: [] for twin in layers}

    def look(twin: TwinFFN, inputs: tuple[torch.Tensor]) -> None:
        if twin.options.role == "student":
            seen[twin].append(inputs[0].flatten(0, -2).bfloat16())

    hooks = [twin.register_forward_pre_hook(look) for twin in layers]
    for ids_BL, positions_BL in batches:
        distiller(ids_BL, positions_BL, measuring=True)
        for twin in layers:
            assert twin.hint is not None
            assert twin.hint.labels_TK is not None, "nothing is routed"
            labels[twin].append(twin.hint.labels_TK)
    for hook in hooks:
        hook.remove()
    return [LayerExamples(torch.cat(seen[twin]), torch.cat(labels[twin])) for twin in layers]


def logistic_regression(train: LayerExamples, num_experts: int, penalty: float) -> torch.Tensor:
    """W [N, D] of least par_loss + penalty * mean square, by L-BFGS on whitened inputs, on which it converges."""
    x_TD = train.x_TD.float()
    gram_DD = (x_TD.T @ x_TD).double() / len(x_TD)
    gram_DD.diagonal().add_(1e-5 * gram_DD.diagonal().mean())
    factor_DD = torch.linalg.cholesky(gram_DD).float()
    z_TD = torch.linalg.solve_triangular(factor_DD, x_TD.T, upper=False).T.contiguous()
    weight_ND = torch.zeros(num_experts, x_TD.shape[1], device=x_TD.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_ND], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = par_loss(z_TD @ weight_ND.T, train.labels_TK) + penalty * weight_ND.square().mean(1).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.linalg.solve_triangular(factor_DD.T, weight_ND.detach().T, upper=True).T


@torch.no_grad()
def judged(logits_TN: torch.Tensor, labels_TK: torch.Tensor) -> tuple[float, float]:
    """Cross-entropy and agreement."""
    chosen_TK = logits_TN.topk(labels_TK.shape[1], dim=1).indices
    return float(par_loss(logits_TN, labels_TK)), float(agreement(chosen_TK, labels_TK))


def layer_result(train: LayerExamples, heldout: LayerExamples, router_ND: torch.Tensor) -> LayerResult:
    num_experts = router_ND.shape[0]
    fitting, judging = train.split(len(train.x_TD) * 7 // 8)

    def unseen(penalty: float) -> float:
        weight_ND = logistic_regression(fitting, num_experts, penalty)
        return judged(judging.x_TD.float() @ weight_ND.T, judging.labels_TK)[0]

    best = logistic_regression(train, num_experts, min(PENALTIES, key=unseen))
    x_TD = heldout.x_TD.float()
    own_TN = x_TD @ router_ND.T
    own_TN = own_TN / own_TN.std(dim=1).median().clamp_min(1e-20)
    own_par = min(judged(own_TN / tau, heldout.labels_TK)[0] for tau in TEMPERATURES)
    return LayerResult(own_par, judged(own_TN, heldout.labels_TK)[1], *judged(x_TD @ best.T, heldout.labels_TK))


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = FinetuneConfig(
        checkpoint=arguments.checkpoint,
        out=arguments.checkpoint.with_name(f"{arguments.checkpoint.name}-par-reference"),
        tokens=arguments.tokens,
        data=arguments.data,
        preset=arguments.preset,
        heldout_tokens=arguments.heldout_tokens,
        block_length=arguments.block_length,
        seed=arguments.seed,
        device=arguments.device,
    )
    progress = progress_listener(quiet=True)
    plan = plan_finetune(config, progress)
    batches = Batches(training_blocks(plan, progress), plan.batch, config.seed, 0, plan.device)
    distiller = build_distiller(plan, progress)
    train = collect(distiller, (batch for step in range(plan.batch.steps) for batch in batches.of_step(step)))
    heldout = collect(distiller, (batch for batch, _ in batches.heldout()))
    routers = [twin.stored_router().detach().float() for twin in twins(distiller.model)]
    results = [layer_result(*own) for own in zip(train, heldout, routers, strict=True)]
    shape = plan.spec.shape
    print(
        f"{shape.notation}, {len(train[0].x_TD):,} tokens to learn from, {len(heldout[0].x_TD):,} held out; by layer:"
    )
    for layer, result in enumerate(results):
        print(layer, " ".join(f"{name} {value:.3f}" for name, value in asdict(result).items()))
    means = {name: sum(asdict(r)[name] for r in results) / len(results) for name in asdict(results[0])}
    means |= {"log_n": math.log(shape.num_experts), "log_k": math.log(shape.top_k)}
    print("mean", json.dumps(means))
    if arguments.json:
        arguments.json.write_text(json.dumps({"mean": means, "layers": [asdict(r) for r in results]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
