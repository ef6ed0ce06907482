"""A worker of the routing benchmark: factorizes, trains and measures through the pipeline, one job after another.

A job is a JSON object on a line of standard input, its result one on standard output. The process lives as long as the
benchmark: libraries are imported, texts tokenised and the device is opened once.
"""

from __future__ import annotations

import functools
import gc
import json
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from routing_cells import REPLY, Cell, Site
from torch import nn

from factorctl.checkpoint.manifest import is_artefact
from factorctl.config.evaluate import EvalConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.evaluation.perplexity import TextDocument, TextScore, score_text
from factorctl.models.loading import load, load_dense
from factorctl.pipeline.common.devices import torch_device
from factorctl.pipeline.common.tokenizers import load_tokenizer
from factorctl.pipeline.evaluate.run import evaluate
from factorctl.pipeline.evaluate.texts import read_text
from factorctl.pipeline.factorize.run import factorize
from factorctl.pipeline.finetune import run as finetune_verb
from factorctl.progress import SilentProgress
from factorctl.training.loop import TrainingLoop
from factorctl.training.state import Progressed
from factorctl.training.twin_ffn import acting_as, twins

PROGRESS = SilentProgress()
SAFETY = 0.85
"""Of the time that a cell may take: steps are not all of it."""


@dataclass
class Curve:
    """Held-out losses on the way, as [tokens, nats per token]."""

    documents: list[TextDocument]
    points: list[tuple[int, float]] = field(default_factory=list)


_curve: Curve | None = None


class WatchedLoop(TrainingLoop):
    """Measures where a state would be saved: a benchmark's run is not resumed, and states of half a gigabyte cost."""

    def _save_once(self, now: Progressed) -> None:
        if now.step != self._saved_step:
            self._saved_step = now.step
            if _curve is not None:
                distiller: Any = self.accelerator.unwrap_model(self.model)
                for twin in twins(distiller.model):
                    twin.hint = None  # the teacher's labels are those of the step's tokens
                with acting_as(distiller.options, "student"):
                    found = score(distiller.model, _curve.documents)
                _curve.points.append((now.tokens, found.mean_nats))


def score(model: nn.Module, documents: list[TextDocument]) -> TextScore:
    longest = max(len(document.ids) for document in documents)
    window = max(2, longest)
    return score_text(model, documents, window=window, stride=max(1, window // 2), progress=PROGRESS)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=8)
def documents_of(site_json: str, text: str, tokens: int) -> list[TextDocument]:
    site = Site(**json.loads(site_json))
    tokenizer = load_tokenizer(Path(site.model), hint="")
    config = EvalConfig(data_tokens=tokens, document_tokens=site.document_tokens)
    return read_text(text, site.texts[text], config, tokenizer, PROGRESS).documents


class Worker:
    """Does jobs for one site."""

    def __init__(self, site: Site) -> None:
        self.site, self.site_json = site, json.dumps(asdict(site))
        self.device = torch_device(site.device)  # type: ignore[arg-type]
        finetune_verb.TrainingLoop = WatchedLoop  # type: ignore[misc]

    def do(self, job: Mapping[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        kinds = {"dense": self.measure_dense, "base": self.make_base, "cell": self.do_cell}
        result = kinds[job["kind"]](job)
        self._release()
        return result | {"seconds": round(time.monotonic() - started, 1)}

    def measure_dense(self, job: Mapping[str, Any]) -> dict[str, Any]:
        model = load_dense(Path(self.site.model), dtype=torch.float32, device=self.device)
        return {"documents": self._measured(model, job["text"])}

    def make_base(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Factorize into `job["out"]`."""
        out = Path(job["out"])
        config = FactorizeConfig(
            model=self.site.model,
            out=out,
            overwrite=is_artefact(out),
            device=self.site.device,  # type: ignore[arg-type]
            calibration=self.site.train,
            **{"calibration_tokens": self.site.calibration_tokens, **job["options"]},
        )
        made = factorize(config, PROGRESS)
        return {"factorize_seconds": made.seconds, "active": made.active_ffn_fraction, "notation": made.notation}

    def do_cell(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Train where the cell asks for it, then measure what was published."""
        cell, base = Cell(**job["cell"]), Path(job["base"])
        if not cell.tokens:
            return self._scored(cell, base)
        out = self.site.home / "trained" / job["directory"]
        trained = self._trained(cell, base, out)
        result = trained | self._scored(cell, out)
        if not job["keep"]:
            shutil.rmtree(out)
        return result

    def _scored(self, cell: Cell, checkpoint: Path) -> dict[str, Any]:
        started = time.monotonic()
        model = load(checkpoint, dtype=torch.float32, device=self.device, verify=False)
        result: dict[str, Any] = {"documents": self._measured(model, cell.text)}
        del model
        self._release()
        result["measuring_seconds"] = round(time.monotonic() - started, 1)
        if cell.tasks and self.site.tasks is not None:
            result["tasks"] = self._task_scores(checkpoint)
        return result

    def _trained(self, cell: Cell, base: Path, out: Path) -> dict[str, Any]:
        global _curve
        options = dict(cell.finetune)
        config = FinetuneConfig(
            checkpoint=base,
            tokens=cell.tokens,
            data=self.site.train,
            out=out,
            overwrite=True,
            device=self.site.device,  # type: ignore[arg-type]
            seed=cell.seed,
            heldout_tokens=self.site.heldout_tokens,
            save_every=cell.curve or cell.tokens,  # see WatchedLoop
            **{"block_length": self.site.block_length, **options},
        )
        config = replace(config, tokens=self._fitting(cell, config))
        _curve = Curve(self._documents(cell.text, self.site.curve_tokens)) if cell.curve else None
        try:
            made = finetune_verb.finetune(config, PROGRESS)
        finally:
            curve, _curve = _curve, None
        names = ("perplexity_dense", "perplexity_before", "perplexity_after", "router_agreement_before",
                 "router_agreement", "losses_before", "losses", "par_of_chance", "steps", "tokens",
                 "tokens_per_second", "peak_memory_bytes")  # fmt: skip
        found = {name: getattr(made, name) for name in names}
        found["dead_experts"] = len(made.dead_experts)
        found["finetune_seconds"] = made.seconds
        shutil.rmtree(out.with_name(f"{out.name}.training"), ignore_errors=True)
        return {"finetune": found, "curve": curve.points if curve else []}

    def _fitting(self, cell: Cell, config: FinetuneConfig) -> int:
        """The tokens of the cell, or as many as its time takes, by the speed of a rehearsal."""
        if not cell.seconds:
            return cell.tokens
        known = self.site.home / f"fitting-{cell.split}-{cell.tokens}.txt"
        if not known.exists():
            speed = finetune_verb.rehearse(config, PROGRESS).tokens_per_second
            known.write_text(str(min(cell.tokens, int(SAFETY * speed * cell.seconds))))
        return int(known.read_text())

    def _task_scores(self, checkpoint: Path) -> dict[str, Any]:
        site = self.site
        config = EvalConfig(
            checkpoint=str(checkpoint),
            against=site.model,
            tasks=site.task_names,
            task_data=Path(str(site.tasks)),
            fidelity=False,
            limit=site.task_limit,
            batch_size=site.task_batch,
            device=site.device,  # type: ignore[arg-type]
            out=site.home / "tasks" / checkpoint.name,
        )
        result = evaluate(config, PROGRESS)
        return json.loads(json.dumps(asdict(result), default=str))

    def _documents(self, text: str, tokens: int) -> list[TextDocument]:
        return documents_of(self.site_json, text, tokens)

    def _measured(self, model: nn.Module, text: str) -> list[list[float]]:
        """[nats, tokens] of each document."""
        found = score(model, self._documents(text, self.site.measured_tokens))
        return [[round(document.nats, 4), document.tokens] for document in found.documents]

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def serve(site: Site) -> None:
    """Jobs from standard input until it ends."""
    torch.set_num_threads(site.threads)
    worker = Worker(site)
    print(f"{REPLY}{json.dumps({'ready': True})}", flush=True)
    for line in sys.stdin:
        try:
            result = worker.do(json.loads(line))
        except Exception as error:  # whatever goes wrong in a job, the others go on
            traceback.print_exc()
            worker._release()
            result = {"error": f"{type(error).__name__}: {error}"}
        print(f"{REPLY}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    serve(Site(**json.loads(sys.argv[1])))
