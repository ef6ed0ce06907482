"""`try`: a dense and a factored model continue the same prompts, one after the other, and are compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Literal, Protocol

import transformers
from transformers import PreTrainedModel

from factorctl.config.trial import TryConfig
from factorctl.errors import UsageError
from factorctl.files.publishing import make_directory, sole_writer_of, write_file
from factorctl.models.assembling import dense_twin
from factorctl.models.filling import adopt_generation_config
from factorctl.models.loading import load
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.common.subjects import ComparedModel, load_model, load_stock
from factorctl.pipeline.trial.comparison import count_alike, described, first_difference
from factorctl.pipeline.trial.engines import Engine, Sampling
from factorctl.pipeline.trial.llama_cpp_engine import LlamaCppEngine
from factorctl.pipeline.trial.plan import Runtime, TryPlan, notation, plan_try, resolved_config
from factorctl.pipeline.trial.prompts import Prompt
from factorctl.pipeline.trial.result import Answer, Continuation, TryResult
from factorctl.pipeline.trial.transformers_engine import TransformersEngine
from factorctl.progress import Progress
from factorctl.reporting.hardware import Hardware, look_at_hardware

Side = Literal["dense", "model"]
WARM_UP = Sampling(max_new_tokens=3)
"""Before the first prompt: paths are chosen, kernels compiled and weights touched then."""
WARM_UP_PROMPT = 8


class Listener(Protocol):
    """Who watches the two models write."""

    def begin(self, prompt: str, titles: dict[Side, str]) -> None:
        """A prompt is given to both, the dense model first."""

    def text(self, side: Side, piece: str) -> None:
        """One of them wrote on."""

    def written(self, side: Side, continuation: Continuation) -> None:
        """One of them is done."""

    def answered(self, answer: Answer) -> None:
        """Both are, and were compared."""

    def refused(self, error: UsageError) -> None:
        """A prompt that was typed cannot be given to them: go on, or raise it."""


def try_models(config: TryConfig, listener: Listener, progress: Progress, *, lines: Iterable[str] = ()) -> TryResult:
    """Continue every prompt with both models.

    1. Find and check the models, the tokenizer and the prompts.
    2. Load both; let each write a few tokens that nobody sees.
    3. For each prompt: the dense model writes, then the other; neither runs while the other does.
    4. Compare: the first token that differs, and the share of tokens chosen alike.
    5. Write the report, where one is asked for.

    Args:
        lines: where the config names no prompt, they come from here, one a line, until it ends.

    Raises:
        FactorctlError: with what is wrong.
    """
    plan = plan_try(config, progress)
    hardware = look_at_hardware(plan.device, plan.dtype)
    if hardware.busy:
        plan.remarks.append(f"{hardware.busy_remark}; trust no tokens/s")
    for remark in plan.remarks:
        progress.note(remark)
    with sole_writer_of(config.out):
        result = _tried(plan, hardware, listener, lines, progress)
        if config.out is not None:
            make_directory(config.out.parent)
            write_file(config.out, json.dumps(asdict(result), indent=1, default=str).encode())
    return result


def _tried(
    plan: TryPlan, hardware: Hardware, listener: Listener, lines: Iterable[str], progress: Progress
) -> TryResult:
    answers: list[Answer] = []
    with engines(plan, progress) as (dense, model):
        for prompt in _prompts(plan, listener, lines):
            answers.append(answer(plan, prompt, (dense, model), listener))
        names = {"dense": dense.name, "model": model.name}
    dense_speed = _tokens_per_second([one.dense for one in answers])
    model_speed = _tokens_per_second([one.model for one in answers])
    tokens = sum(len(one.dense.tokens) for one in answers)
    return TryResult(
        checkpoint=str(plan.model.path),
        source=plan.reference.id,
        notation=notation(plan),
        runtime=names,
        same_runtime=plan.same_runtime,
        chat=plan.chat,
        temperature=plan.sampling.temperature,
        top_p=plan.sampling.top_p,
        max_new_tokens=plan.sampling.max_new_tokens,
        seed=plan.sampling.seed,
        answers=answers,
        dense_tokens_per_second=dense_speed,
        model_tokens_per_second=model_speed,
        speed_up=model_speed / dense_speed if plan.same_runtime and dense_speed and model_speed else None,
        alike_share=sum(one.alike for one in answers) / tokens if tokens else None,
        hardware=hardware,
        busy=hardware.busy,
        versions=library_versions(),
        config=resolved_config(plan),
        remarks=plan.remarks,
        written=[] if plan.config.out is None else [str(plan.config.out)],
    )


def _prompts(plan: TryPlan, listener: Listener, lines: Iterable[str]) -> Iterator[Prompt]:
    """Those that the config names, else the lines that are not blank, one at a time."""
    if plan.prompts:
        yield from plan.prompts
        return
    for line in lines:
        if not line.strip():
            continue
        try:
            prompt = plan.prepare(line.rstrip("\r\n"))
        except UsageError as error:
            listener.refused(error)
            continue
        yield prompt


def answer(plan: TryPlan, prompt: Prompt, pair: tuple[Engine, Engine], listener: Listener) -> Answer:
    """One prompt: what both make of it, and how that compares."""
    listener.begin(prompt.text, titles(plan))
    dense = _written("dense", pair[0], prompt, plan.sampling, listener)
    model = _written("model", pair[1], prompt, plan.sampling, listener)
    alike = count_alike(prompt.ids, dense, model, engines=pair, greedy=plan.sampling.greedy)
    place = first_difference(dense.tokens, model.tokens)
    found = Answer(
        prompt=prompt.text,
        prompt_tokens=len(prompt.ids),
        dense=dense,
        model=model,
        dense_tokens_per_second=_tokens_per_second([dense]),
        model_tokens_per_second=_tokens_per_second([model]),
        first_difference=described(place, dense, model, plan.tokenizer),
        alike=alike,
        alike_share=alike / len(dense.tokens),
    )
    listener.answered(found)
    return found


def titles(plan: TryPlan) -> dict[Side, str]:
    """What stands over each of the two texts."""
    name = plan.model.path.name if plan.gguf is None or plan.gguf.manifest is None else plan.gguf.file.parent.name
    said = notation(plan)
    return {"dense": f"{plan.reference.id}, dense", "model": name if said is None else f"{name}, {said}"}


def _written(side: Side, engine: Engine, prompt: Prompt, sampling: Sampling, listener: Listener) -> Continuation:
    found = engine.continuation(prompt.ids, sampling, lambda piece: listener.text(side, piece))
    listener.written(side, found)
    return found


def _tokens_per_second(continuations: Sequence[Continuation]) -> float | None:
    """Of decoding: the first token of each continuation belongs to its prompt."""
    steps = sum(one.steps for one in continuations)
    seconds = sum(one.decode_ms for one in continuations if one.steps) / 1e3
    return steps / seconds if steps and seconds else None


@contextmanager
def engines(plan: TryPlan, progress: Progress) -> Iterator[tuple[Engine, Engine]]:
    """The dense model and the other, both in memory and warm while the block runs."""
    with ExitStack() as stack:
        with progress.stage(f"Loading {plan.reference.id}"):
            loaded = _loaded(plan.reference, plan.runtimes[0], plan)
        ends = _end_tokens(loaded, plan)
        dense = TransformersEngine(_name(plan.runtimes[0]), loaded, plan.tokenizer, ends)
        stack.callback(dense.close)
        with progress.stage(f"Loading {plan.model.path.name}"):
            model = _engine_of_the_model(plan, ends)
        stack.callback(model.close)
        with progress.stage("Warming up"):
            ids = plan.prompts[0].ids[:WARM_UP_PROMPT] if plan.prompts else [0]
            for engine in (dense, model):
                engine.continuation(ids, WARM_UP, lambda piece: None)
        yield dense, model


def _engine_of_the_model(plan: TryPlan, ends: frozenset[int]) -> Engine:
    if plan.gguf is not None:
        return LlamaCppEngine(plan.gguf.file, plan.tokenizer, context=plan.gguf.context, ends=ends)
    return TransformersEngine(
        _name(plan.runtimes[1]), _loaded(plan.model, plan.runtimes[1], plan), plan.tokenizer, ends
    )


def _loaded(model: ComparedModel, runtime: Runtime, plan: TryPlan) -> PreTrainedModel:
    if runtime == "bitsandbytes":
        return load(model.path, dtype=plan.dtype, device=plan.device, verify=False)
    if model.native is not None:
        return load_model(model, dtype=plan.dtype, device=plan.device)
    if runtime == "transformers":
        return load_stock(model.path, plan.dtype, plan.device)
    twin = dense_twin(model.path, dtype=plan.dtype, device=plan.device)
    adopt_generation_config(twin, model.path)
    return twin


def _name(runtime: Runtime) -> str:
    suffix = {
        "factorctl": " with factorctl's FFN",
        "transformers": "",
        "bitsandbytes": ", experts held by factorctl.load",
        "llama.cpp": "",
    }[runtime]
    return f"transformers {transformers.__version__}{suffix}"


def _end_tokens(dense: PreTrainedModel, plan: TryPlan) -> frozenset[int]:
    """What `generate()` stops at with the dense model, and the tokenizer's own end of text."""
    named = dense.generation_config.eos_token_id if dense.generation_config is not None else None
    ids = [*(named if isinstance(named, list) else [named]), plan.tokenizer.eos_token_id]
    return frozenset(token for token in ids if isinstance(token, int) and 0 <= token < plan.reference.vocabulary)
