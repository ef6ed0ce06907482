"""The training loop: gradients of a global batch, one optimiser step, what to write down, when to stop.

Runs under accelerate in one process or many. Every process takes the same decisions: what they hang on (losses, load,
a wish to stop) is reduced over all of them first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from factorctl.errors import FactorctlError
from factorctl.memory import peak_memory
from factorctl.progress import Progress, Task
from factorctl.training.batches import Batches
from factorctl.training.distiller import StepReport
from factorctl.training.heldout import PARTS
from factorctl.training.load_watch import LoadWatch
from factorctl.training.metrics import MetricsFile
from factorctl.training.optimizers import Schedule, is_router, set_learning_rate
from factorctl.training.out_of_memory import memory_explained
from factorctl.training.selection import keep_order, refresh_routers
from factorctl.training.sharding import all_gathered
from factorctl.training.signals import StopRequest, stop_request
from factorctl.training.state import Progressed, newest_state, save_state, state_path
from factorctl.training.twin_ffn import twins

_MEANS = (*PARTS, "total", "agreement")


@dataclass(frozen=True)
class LoopOptions:
    """How a run goes, beside its batches."""

    schedule: Schedule
    clip_norm: float
    router_warmup: int
    """Tokens at the start during which only routers learn."""
    router_refresh: int
    """Tokens between closed-form fits of the routers; 0 means none."""
    heal_tokens: int
    """Tokens at the start during which each layer learns alone."""
    save_every: int
    top_k: int
    balance: float
    """The weight of the balance loss."""
    idle: frozenset[tuple[int, int]] = frozenset()
    """(layer, expert) that held what hardly any token needs before training began."""


@dataclass(frozen=True)
class StepSummary:
    """One step's means over all micro-batches of all processes."""

    means: dict[str, float]
    load_LN: torch.Tensor | None
    gradient_norms: dict[str, float]
    """Before clipping: `gradient_norm` of the experts, `router_gradient_norm` of the routers; of those that learn."""
    stops: bool
    """Some process was asked to stop."""

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.means["total"], *self.gradient_norms.values())))


class TrainingLoop:
    """Trains a prepared model until its tokens are used up or someone stops it.

    Args:
        accelerator: accelerate's, to which `model` and `optimizers` belong.
        model: a `Distiller`, wrapped or not.
        run: directory of states and metrics.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        batches: Batches,
        options: LoopOptions,
        run: Path,
        progress: Progress,
    ) -> None:
        self.accelerator, self.model, self.optimizers = accelerator, model, optimizers
        self.batches, self.options, self.run, self.progress = batches, options, run, progress
        self.trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.layers = twins(accelerator.unwrap_model(model).model)
        self.metrics = MetricsFile(run)
        self.watch = LoadWatch(options.top_k, options.balance, progress, options.idle)
        # Processes that train together must decide alike, or one waits for ever for the others. So they do not ask the
        # disk, where the first may already have written, nor their signals, which come to each in its own time.
        self._stopped = False
        self._saved_step: int | None = None

    def train(self, start: Progressed) -> Progressed:
        """Go on from `start` to the last step; the last state is saved.

        Raises:
            FactorctlError: a loss is not finite; says where, and which state is good.
            ResourceError: the device ran out of memory.
            KeyboardInterrupt: or what the caller's SIGTERM handler raises, once the state is saved.
        """
        plan, now = self.batches.plan, start
        if newest_state(self.run) == state_path(self.run, start.step):
            self._saved_step = start.step
        with stop_request() as request:
            with self.progress.stage("Training", total=plan.tokens, unit="tokens") as task:
                task.advance(start.tokens)
                while now.step < plan.steps and not self._stopped:
                    now = self._advance(now, request, task)
            if self._stopped or request.signal is not None:
                self._save_once(now)
                self.progress.note(f"saved {now.tokens:,} tokens in; go on with the same command and --resume")
                request.obey()
                raise KeyboardInterrupt  # another process was asked to stop
        self.watch.look()
        return now

    def _advance(self, now: Progressed, request: StopRequest, task: Task) -> Progressed:
        """One step, its metrics, and a state when one is due."""
        plan, options, started = self.batches.plan, self.options, time.perf_counter()
        after = replace(now, step=now.step + 1, tokens=now.tokens + plan.batch_tokens)
        set_learning_rate(self.optimizers, options.schedule.factor(after.tokens))
        where = f"in step {after.step}"
        with memory_explained(where, plan, self.batches.device, lambda: self._kept_before(now)):
            summary = self._gradients(now, request)
        if not summary.is_finite:
            self._not_finite(now, summary)
        if now.tokens < options.router_warmup:
            self._forget_gradients(routers=False)
        with memory_explained(where, plan, self.batches.device, self._last_good_state):  # some weights have moved
            for optimizer in self.optimizers:
                optimizer.step()
            keep_order(self.layers)
            if crosses(options.router_refresh, now.tokens, after.tokens):
                refresh_routers(self.layers)
        self._forget_gradients(routers=True)
        seconds = time.perf_counter() - started
        self._report(after, summary, seconds, task)
        if crosses(options.save_every, now.tokens, after.tokens) or after.step == plan.steps:
            self._save_once(after)
        alone = self.accelerator.num_processes == 1
        self._stopped = summary.stops or (alone and request.signal is not None)
        return after

    def _gradients(self, now: Progressed, request: StopRequest) -> StepSummary:
        """Gradients of the global batch, clipped, and what was measured on the way."""
        reports = []
        rounds = self.batches.of_step(now.step)
        healing = now.tokens < self.options.heal_tokens
        for index, (ids_BL, positions_BL) in enumerate(rounds):
            with nullcontext() if index == len(rounds) - 1 else self.accelerator.no_sync(self.model):
                report = self.model(ids_BL, positions_BL, healing=healing)
                self.accelerator.backward(report.total / len(rounds))
            reports.append(report._replace(total=report.total.detach()))
        return self._summarised(reports, self._clipped(), request)

    def _clipped(self) -> dict[str, float]:
        """Cut the gradients, and say what their norms were. Routers and experts apart: the gradient of a router's
        cross-entropy is of another size, and would decide how far experts may go."""
        limit, norms = self.options.clip_norm or math.inf, {}
        for name, routers in (("gradient_norm", False), ("router_gradient_norm", True)):
            own = [p for n, p in self.trained if is_router(n) == routers]
            if own:
                norms[name] = float(all_gathered(nn.utils.clip_grad_norm_(own, limit)))
        return norms

    def _summarised(self, reports: list[StepReport], norms: dict[str, float], request: StopRequest) -> StepSummary:
        names = [name for name in _MEANS if getattr(reports[0], name) is not None]
        rows = [torch.stack([getattr(report, name).float() for name in names]) for report in reports]
        wish = torch.tensor([float(request.signal is not None)], device=rows[0].device)
        means = self.accelerator.reduce(torch.cat([torch.stack(rows).mean(0), wish]), reduction="mean").tolist()
        load = None
        if reports[0].load_LN is not None:
            load = torch.stack([report.load_LN for report in reports if report.load_LN is not None]).sum(0)
            load = self.accelerator.reduce(load, reduction="sum").cpu()
        return StepSummary(dict(zip(names, means[:-1], strict=True)), load, norms, means[-1] > 0)

    def _forget_gradients(self, *, routers: bool) -> None:
        """Drop the gradients, those of the routers only if asked: an optimiser skips what has none."""
        for name, parameter in self.trained:
            if routers or not is_router(name):
                parameter.grad = None

    def _save_once(self, now: Progressed) -> None:
        if now.step != self._saved_step:
            model = self.accelerator.unwrap_model(self.model)
            save_state(self.run, now, model, self.optimizers, writes=self.accelerator.is_main_process)
            self.accelerator.wait_for_everyone()
            self._saved_step = now.step

    def _report(self, now: Progressed, summary: StepSummary, seconds: float, task: Task) -> None:
        plan = self.batches.plan
        speed = plan.batch_tokens / seconds
        line: dict[str, Any] = {
            "step": now.step,
            "tokens": now.tokens,
            "epoch": round(self.batches.order.epoch(now.step * plan.batch_blocks), 4),
            **summary.means,
            **summary.gradient_norms,
            "lr_factor": self.options.schedule.factor(now.tokens),
            "tokens_per_second": round(speed, 1),
            "memory_bytes": peak_memory(self.batches.device),
        }
        shown: dict[str, object] = {n: v for n, v in summary.means.items() if n not in ("total", "agreement")}
        shown |= {"tok/s": round(speed), "GB": round(line["memory_bytes"] / 1e9, 2)}
        if "agreement" in summary.means:
            shown["agree"] = f"{summary.means['agreement']:.0%}"
        if summary.load_LN is not None:
            share_LN = summary.load_LN / plan.batch_tokens
            line |= {"load_busiest": float(share_LN.max()), "load_idlest": float(share_LN.min())}
            shown |= {
                "busiest": _named(share_LN, int(share_LN.argmax())),
                "idlest": _named(share_LN, int(share_LN.argmin())),
            }
            self.watch.add(summary.load_LN, plan.batch_tokens)
        if self.accelerator.is_main_process:
            self.metrics.append(line)
        self.accelerator.log({k: v for k, v in line.items() if k not in ("step", "tokens")}, step=now.step)
        task.advance(plan.batch_tokens, **shown)

    def _not_finite(self, now: Progressed, summary: StepSummary) -> None:
        values = summary.means | summary.gradient_norms
        parts = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())
        raise FactorctlError(
            f"step {now.step + 1} ({now.tokens:,} tokens in): a loss or gradient is not finite ({parts}); "
            f"{self._last_good_state()}",
            "the weights were not touched; start over with a lower --lr or --router-lr, or with --precision float32",
        )

    def _last_good_state(self) -> str:
        good = newest_state(self.run)
        return f"the last good state is {good}" if good else "no state was saved before"

    def _kept_before(self, now: Progressed) -> str:
        """Weights and optimiser are those of the last whole step: save them, and say so."""
        self._forget_gradients(routers=True)
        if self.accelerator.num_processes > 1:  # others would wait for one that has failed
            return self._last_good_state()
        self._save_once(now)
        return f"the state {now.tokens:,} tokens in is saved"


def crosses(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens, if that is not 0, is reached."""
    return bool(every) and after // every > before // every


def _named(share_LN: torch.Tensor, place: int) -> str:
    layer, expert = divmod(place, share_LN.shape[1])
    return f"{float(share_LN[layer, expert]):.1%} (layer {layer} expert {expert})"
