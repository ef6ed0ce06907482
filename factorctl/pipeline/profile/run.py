"""`profile`: a native checkpoint in, a report of what it costs to run out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from factorctl.config.option import EVERY_ROLE, recorded
from factorctl.config.profile import ProfileConfig
from factorctl.errors import ResourceError
from factorctl.ffn.choice import steps_for
from factorctl.ffn.tuned import cache_file, write_tuned
from factorctl.files.publishing import make_directory, sole_writer_of, write_file
from factorctl.memory import peak_memory
from factorctl.models.building import factored_ffns
from factorctl.models.loading import NativeCheckpoint, load, open_checkpoint
from factorctl.pipeline.common.devices import compute_dtype, torch_device
from factorctl.pipeline.common.provenance import library_versions
from factorctl.pipeline.common.workspace import newest_checkpoint, refuse_directory
from factorctl.pipeline.profile.html_report import html_page
from factorctl.pipeline.profile.text import profile_text
from factorctl.profiling.attribution import FfnCost, ffn_cost
from factorctl.profiling.expert_load import RoutedText, mean_hits, route_text
from factorctl.profiling.flop_check import check_flops
from factorctl.profiling.flops import count_flops, experts_run_by, reduction, sweep_top_k
from factorctl.profiling.latency import Effort, Regime, Samples, measure_regime, text_batch
from factorctl.profiling.plots import draw
from factorctl.profiling.report import (
    FlopsReport,
    LatencyRow,
    MachineReport,
    Phase,
    ProfileResult,
    TuningReport,
)
from factorctl.profiling.roofline import Machine, ceiling, measure_machine
from factorctl.profiling.sizes import ModelSizes
from factorctl.profiling.tuning import ladder, model_site, time_paths
from factorctl.profiling.variants import VariantName, make_variants
from factorctl.progress import Progress
from factorctl.reporting.hardware import Hardware, look_at_hardware
from factorctl.reporting.statistics import ratio_of_medians, spread

CHECK_TOKENS = 64
"""Prompt on which torch counts FLOPs: the counts grow with it, their difference does not."""
MOST_FFN_TOKENS = 512


@dataclass(frozen=True)
class Subject:
    """What is measured, and everything that the measurements share."""

    config: ProfileConfig
    checkpoint: NativeCheckpoint
    model: PreTrainedModel
    sizes: ModelSizes
    tokens: torch.Tensor
    text: RoutedText
    machine: Machine

    @property
    def itemsize(self) -> int:
        return next(self.model.parameters()).dtype.itemsize

    def experts_hit(self, tokens: int) -> float:
        return mean_hits(self.text.loads, self.sizes.shape.top_k, tokens)


def profile(config: ProfileConfig, progress: Progress) -> ProfileResult:
    """Count, time and explain.

    1. Look at the machine; mark, or refuse, a busy one.
    2. Load the checkpoint and the text that decides its routing.
    3. Hold our FLOP count against torch's.
    4. Tune the execution paths, if asked to.
    5. Time model and anchors, interleaved, in every regime; then one layer's parts.
    6. Write the report, the plots and the page.

    Raises:
        UsageError: an option does not fit the checkpoint, or another process writes the same report.
        ResourceError: the machine is busy and quiet was demanded, or the device is not there.
        FlopMismatchError: the two FLOP counts differ by more than 0.1%.
    """
    refuse_directory("--out", config.out, "profile.json")
    refuse_directory("--html", config.html, "profile.html")
    with sole_writer_of(config.out, config.html, config.plots):
        result = _profiled(config, progress)
        write_outputs(result)
    for remark in result.remarks:
        progress.note(remark)
    return result


def _profiled(config: ProfileConfig, progress: Progress) -> ProfileResult:
    remarks: list[str] = []
    device = torch_device(config.device)
    checkpoint = open_checkpoint(config.checkpoint or newest_checkpoint(config.workspace))
    dtype = compute_dtype(config.dtype, checkpoint.path, device, remarks)
    flag_long_prompts(config, checkpoint, remarks)
    hardware = look_at_hardware(device, dtype)
    flag_busy(hardware, config, remarks)
    if hardware.no_kernel:
        remarks.append(hardware.no_kernel_remark)
    with progress.stage("Loading the checkpoint"):
        model = load(checkpoint.path, top_k=config.top_k, scale=config.scale, dtype=dtype, device=device, verify=False)
    tokens, text_name = profile_text(config, checkpoint, remarks, progress)
    tokens = tokens.to(device)
    shape = next(iter(factored_ffns(model))).shape
    sizes = ModelSizes.of(checkpoint.dense.config, shape)
    with progress.stage("Counting FLOPs"):
        difference = check_flops(model, sizes, text_batch(tokens, 1, CHECK_TOKENS))
    with progress.stage("Routing the text"):
        routed = route_text(model, text_batch(tokens, 1, max(config.prompt)))
        machine = measure_machine(sizes, dtype, device)
    subject = Subject(config, checkpoint, model, sizes, tokens, routed, machine)
    tuning = tune(subject, progress) if config.tune and sizes.routes else None
    rows = measure_latency(subject, progress) if config.latency else []
    flops = flops_report(subject, difference)
    return ProfileResult(
        checkpoint=str(checkpoint.path),
        manifest_sha256=checkpoint.manifest.sha256,
        notation=shape.notation,
        text=text_name,
        flops=flops,
        ffn_flops_reduction=reduction(flops.dense["ffn"], flops.model["ffn"]),
        total_flops_reduction=reduction(flops.dense["total"], flops.model["total"]),
        sweep=sweep_top_k(sizes, flops.tokens) if config.sweep_k else [],
        latency=rows,
        ffn_costs=explain_ffn(subject, progress) if config.latency else [],
        expert_load=routed.loads,
        machine=MachineReport(machine.gemm_flops / 1e9, machine.bandwidth / 1e9),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        peak_rss_bytes=peak_memory(),
        hardware=hardware,
        busy=hardware.busy,
        versions=library_versions(),
        config=recorded(config, *EVERY_ROLE),
        remarks=remarks,
        tuning=tuning,
        written=[str(path) for path in (config.out, config.html, config.plots) if path is not None],
    )


def flag_long_prompts(config: ProfileConfig, checkpoint: NativeCheckpoint, remarks: list[str]) -> None:
    """Mark lengths that the model was not made for: they can be timed, and will not be met."""
    context = checkpoint.dense.context
    longest = max(config.prompt) + config.decode_tokens
    if context is not None and longest > context:
        remarks.append(
            f"prompts reach {longest:,} tokens, the model's context {context:,}: --prompt {context // 2} is within it"
        )


def flag_busy(hardware: Hardware, config: ProfileConfig, remarks: list[str]) -> None:
    """Mark a busy machine, or refuse it with --require-quiet.

    Raises:
        ResourceError: quiet was demanded.
    """
    if not hardware.busy:
        return
    if config.require_quiet:
        raise ResourceError(hardware.busy_remark, "stop what else runs, or leave out --require-quiet")
    remarks.append(f"{hardware.busy_remark}; trust ratios, not milliseconds")


def tune(subject: Subject, progress: Progress) -> TuningReport:
    """Time the paths, cache the ladder of this site, and use it from here on."""
    site = model_site(subject.model)
    device = next(subject.model.parameters()).device
    before = steps_for(device, site.dtype, site.hidden_size, astuple(site.shape), site.kernel)
    timings = time_paths(subject.model, subject.text, progress)
    steps = ladder(timings)
    write_tuned(cache_file(), {site.key: steps})
    return TuningReport(site.key, str(cache_file()), timings, steps, before)


def measure_latency(subject: Subject, progress: Progress) -> list[LatencyRow]:
    """Both phases of every regime, batches within prompts."""
    config = subject.config
    variants = make_variants(subject.model)
    effort = Effort(config.rounds, config.decode_tokens, config.seconds)
    rows: list[LatencyRow] = []
    regimes = [Regime(batch, prompt) for prompt in config.prompt for batch in config.batch]
    with progress.stage("Timing", total=len(regimes), unit="regimes") as task:
        for regime in regimes:
            ids = text_batch(subject.tokens, regime.batch, regime.prompt + config.decode_tokens)
            samples = measure_regime(variants, ids, regime, effort)
            rows += [latency_row(subject, phase, regime, samples) for phase in ("prefill", "decode")]
            task.advance(batch=regime.batch, prompt=regime.prompt, speedup=rows[-1].speedup.median)
    return rows


def latency_row(subject: Subject, phase: Phase, regime: Regime, samples: Mapping[VariantName, Samples]) -> LatencyRow:
    times = {name: found.prefill_ms if phase == "prefill" else found.decode_ms for name, found in samples.items()}
    spreads = {str(name): spread(found) for name, found in times.items()}
    new = regime.prompt if phase == "prefill" else 1
    routed = regime.batch * new
    seed = subject.config.seed
    return LatencyRow(
        phase=phase,
        batch=regime.batch,
        tokens=regime.prompt,
        path=next(iter(factored_ffns(subject.model))).path_for(routed),
        dense_ms=spreads["dense"].p50,
        model_ms=spreads["model"].p50,
        narrow_ms=spreads["narrow"].p50,
        stock_ms=spreads["stock"].p50,
        speedup=ratio_of_medians(times["dense"], times["model"], seed=seed),
        ceiling=ceiling(
            subject.sizes,
            subject.machine,
            tokens=new,
            context=0 if phase == "prefill" else regime.prompt,
            batch=regime.batch,
            experts_hit=subject.experts_hit(routed),
            itemsize=subject.itemsize,
        ),
        floor_share=ratio_of_medians(times["narrow"], times["model"], seed=seed),
        spread=spreads,
        tokens_per_second=1e3 * routed / spreads["model"].p50,
        peak_bytes=samples["model"].peak_bytes,
        samples_ms={str(name): [round(sample, 4) for sample in found] for name, found in times.items()},
    )


def flops_report(subject: Subject, difference: float) -> FlopsReport:
    """Of one prompt as long as the longest asked for."""
    sizes, tokens = subject.sizes, max(subject.config.prompt)
    path = next(iter(factored_ffns(subject.model))).path_for(tokens)
    return FlopsReport(
        tokens=tokens,
        dense=count_flops(sizes.dense, tokens).to_json(),
        model=count_flops(sizes, tokens).to_json(),
        executed=count_flops(sizes, tokens, experts_run=experts_run_by(path, sizes)).to_json(),
        counter_difference=difference,
    )


def explain_ffn(subject: Subject, progress: Progress) -> list[FfnCost]:
    """One row per number of tokens that some regime gives to an FFN at once, up to 512: more change no share."""
    config = subject.config
    regimes = {batch * prompt for batch in config.batch for prompt in config.prompt}
    counts = sorted({min(count, MOST_FFN_TOKENS) for count in {*config.batch, *regimes}})
    rows = []
    with progress.stage("Timing FFN layers", total=len(counts), unit="token counts") as task:
        for tokens in counts:
            rows.append(ffn_cost(subject.model, subject.sizes, subject.text, tokens, subject.itemsize))
            task.advance(tokens=tokens)
    return rows


def write_outputs(result: ProfileResult) -> None:
    """The JSON with all samples, the PNG files and the page, where they were asked for."""
    out, html, plots_at = (result.config[key] for key in ("out", "html", "plots"))
    plots = draw(result) if (html or plots_at) and result.latency else {}
    if out:
        _write(Path(str(out)), json.dumps(asdict(result), indent=1, default=str).encode())
    if html:
        _write(Path(str(html)), html_page(result, plots).encode())
    for name, png in plots.items() if plots_at else ():
        _write(Path(str(plots_at)) / f"{name}.png", png)


def _write(path: Path, content: bytes) -> None:
    make_directory(path.parent)
    write_file(path, content)
