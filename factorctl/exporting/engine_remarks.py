"""What an export has to say of itself: neurons that were added, and engines that would run it wrongly."""

from __future__ import annotations

from factorctl.config.export import ExportConfig
from factorctl.exporting.engines import Flaw, as_served
from factorctl.exporting.forms import Form
from factorctl.exporting.stock.architecture import Architecture
from factorctl.exporting.stock.architectures import architectures
from factorctl.exporting.stock.choice import architecture_for, becomes_mixture, blockers
from factorctl.models.loading import NativeCheckpoint


def padding_remarks(checkpoint: NativeCheckpoint, form: Form) -> list[str]:
    """How many neurons of zeros were added, and where."""
    if form.sizes is None or form.unpadded is None or form.sizes == form.unpadded:
        return []
    own, padded, num_experts = form.unpadded, form.sizes, checkpoint.spec.shape.num_experts
    parts = []
    if padded.expert > own.expert:
        parts.append(f"each expert's {own.expert} to {padded.expert}")
    if padded.shared > own.shared:
        parts.append(f"the {own.shared} shared ones to {padded.shared}")
    added = num_experts * (padded.expert - own.expert) + padded.shared - own.shared
    share = added / (num_experts * own.expert + own.shared)
    return [
        f"neurons of zeros, which change no output, fill up {' and '.join(parts)}: {share:.1%} more weights in FFNs"
    ]


def engine_remarks(checkpoint: NativeCheckpoint, config: ExportConfig) -> list[str]:
    """The engines that load this export and compute something else without a word, with what to give them instead."""
    dense, spec = checkpoint.dense, checkpoint.spec
    if config.target != "hf" or not becomes_mixture(config.target, spec):
        return []
    arch = architecture_for(dense, spec, config.arch)
    wrong = [flaw for flaw in arch.flaws_in(as_served(dense, spec, untied=config.untie_lm_head)) if flaw.is_silent]
    return [
        f"{flaw.engine} runs this {arch.class_name} wrongly without a word, for it {flaw.does}; "
        + _instead(checkpoint, config, arch, flaw)
        for flaw in wrong
    ]


def _instead(checkpoint: NativeCheckpoint, config: ExportConfig, arch: Architecture, flaw: Flaw) -> str:
    """Another form of the checkpoint that is right in this engine, or the engine that has one."""
    dense, spec = checkpoint.dense, checkpoint.spec

    def is_right(other: Architecture, *, untied: bool) -> bool:
        return flaw.engine in other.engines_that_run(as_served(dense, spec, untied=untied))

    if is_right(arch, untied=True):
        return "with --untie-lm-head it is right"
    fitting = [
        row.option
        for row in architectures()
        if is_right(row, untied=config.untie_lm_head)
        and not blockers(dense, spec, config.target, exact=config.exact, arch=row.option)
    ]
    if fitting:
        return f"--arch {fitting[0]} is right there"
    if blockers(dense, spec, "gguf", exact=config.exact):
        return "no form of this mixture of experts is right there"
    return "no such form is right there; llama.cpp runs --to gguf"
