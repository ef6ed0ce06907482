"""`factorctl export`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from factorctl.cli.options import (
    CheckpointArg,
    DeviceOpt,
    DryRunOpt,
    DTypeOpt,
    FormatOpt,
    OutOpt,
    OutputFormat,
    OverwriteOpt,
    QuietOpt,
    SeedOpt,
    WorkspaceOpt,
)
from factorctl.config.common import DEFAULT_WORKSPACE
from factorctl.config.export import Arch, ExportConfig, ExportTarget
from factorctl.errors import UsageError

if TYPE_CHECKING:
    from factorctl.pipeline.export.plan import ExportPlan
    from factorctl.pipeline.export.run import ExportResult

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|K|M|G|T)B?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def export(
    checkpoint: CheckpointArg = None,
    to: Annotated[
        ExportTarget,
        typer.Option(
            "--to",
            help="hf: a stock transformers mixture of experts; gguf: llama.cpp and Ollama; dense: the source's "
            "architecture; bnb-4bit, bnb-8bit: quantised by bitsandbytes, routed experts for factorctl.load.",
        ),
    ] = "hf",
    arch: Annotated[
        Arch,
        typer.Option("--arch", help="Stock transformers architecture; auto takes the one that most engines run right."),
    ] = "auto",
    pad_experts: Annotated[
        str,
        typer.Option(
            "--pad-experts",
            metavar="N",
            help="Fill experts up to a multiple of N neurons with zeros, which is exact; 1 adds none. auto: 32 where "
            "transformers' grouped_mm or a block-wise GGUF type would refuse the size.",
        ),
    ] = "auto",
    quant: Annotated[
        str,
        typer.Option(
            "--quant",
            help="GGUF storage: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; by llama.cpp's own quantiser q6_k, "
            "q5_k_m, q4_k_m, q3_k_m and their kin (pip install cyllama); auto keeps the dtype.",
        ),
    ] = "auto",
    exact: Annotated[
        bool, typer.Option("--exact", help="Refuse what is only near the native function (gate hard, several experts).")
    ] = False,
    untie_lm_head: Annotated[
        bool, typer.Option("--untie-lm-head", help="Store the head beside the embeddings it equals; SGLang needs it.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest weight file, e.g. 500MB; also bounds memory.")
    ] = "2GB",
    verify_gguf: Annotated[
        bool, typer.Option("--verify-gguf", help="Demand a comparison in llama.cpp itself (pip install xllamacpp).")
    ] = False,
    accept_difference: Annotated[
        float | None,
        typer.Option(
            "--accept-difference",
            metavar="KL",
            min=0,
            help="Publish where rounding moves the model by up to this many nats per token; the card says how far. "
            "[default: any, if it is 0.1 with the same experts, 0.5 in 4 and 5 bits]",
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload the finished export to this Hub repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that --push creates private.")] = False,
    out: OutOpt = None,
    workspace: WorkspaceOpt = DEFAULT_WORKSPACE,
    seed: SeedOpt = 0,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    overwrite: OverwriteOpt = False,
    dry_run: DryRunOpt = False,
    output: FormatOpt = "text",
    quiet: QuietOpt = False,
) -> None:
    """Turn a native checkpoint into what unmodified stock engines run, and prove that it computes the same.

    The export is loaded in the stock engine and its logits are compared with the native model's before it is published;
    if they differ, nothing is. What a target cannot hold is refused by name.

    Examples:

        factorctl export runs/demo-1R4E2K

        factorctl export runs/demo-1R4E2K --to gguf --quant q8_0
    """
    from factorctl.cli.render import progress_listener
    from factorctl.pipeline.export.plan import plan_export
    from factorctl.pipeline.export.run import export as run_export

    config = ExportConfig(
        checkpoint=checkpoint,
        target=to,
        arch=arch,
        pad_experts=parse_multiple(pad_experts),
        quant=quant,
        exact=exact,
        untie_lm_head=untie_lm_head,
        max_shard_bytes=parse_bytes(max_shard_size, "--max-shard-size"),
        verify_gguf=verify_gguf,
        accept_difference=accept_difference,
        push=push,
        private=private,
        out=out,
        workspace=workspace,
        seed=seed,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
    )
    progress = progress_listener(quiet=quiet)
    if dry_run:
        _show_plan(plan_export(config, progress), output)
    else:
        _show_result(run_export(config, progress), output)


def parse_bytes(text: str, option: str) -> int:
    """'500MB' as 500,000,000.

    Raises:
        UsageError: no such size.
    """
    match = _SIZE.fullmatch(text.strip())
    size = round(float(match[1]) * _FACTORS[match[2].upper()]) if match else 0
    if size <= 0:
        raise UsageError(f"{option} {text!r} is no size", "for example 500MB or 2GB")
    return size


def parse_multiple(text: str) -> int | Literal["auto"]:
    """`--pad-experts` as a number or `auto`.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise UsageError(f"--pad-experts {text!r} is no number of neurons", "for example 32; or auto")
    return int(text)


def _show_plan(plan: ExportPlan, output: OutputFormat) -> None:
    from factorctl.cli.render import gigabytes, show_plan

    facts: dict[str, object] = {
        "checkpoint": str(plan.job.checkpoint.path),
        "notation": plan.job.checkpoint.spec.shape.notation,
        "format": plan.job.config.target,
        "architecture": plan.job.form.architecture,
        "dtype": plan.job.form.dtype,
        "weight_files": plan.writer.num_shards or 1,
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes,
        "out": str(plan.out),
    }
    words = {**facts, "disk_bytes": gigabytes(plan.disk_bytes), "memory_bytes": gigabytes(plan.memory_bytes)}
    show_plan(facts, words, output=output)


def _show_result(result: ExportResult, output: OutputFormat) -> None:
    from factorctl.cli.render import facts_table, gigabytes, show

    facts: dict[str, object] = {
        "format": f"{result.format}, {result.architecture}, {result.dtype}",
        "compared in": f"{result.engine}, {result.tokens_compared} tokens",
        "largest logit error": result.max_logit_error,
        "top-1 agreement": None if result.top1_agreement is None else f"{result.top1_agreement:.2%}",
        "KL (nats per token)": result.kl,
    }
    if result.all_experts_error is not None:
        facts["every expert on"] = f"logits within {result.all_experts_error:.1g} of their spread"
    if result.near_ties:
        facts["near ties"] = f"{result.near_ties:.2%} of the decisions; {result.tokens_judged} tokens before the first"
    if result.changed_choices:
        facts["experts changed"] = (
            f"{result.changed_choices:.2%} of the decisions; else KL {result.kl_same_experts:.2g}"
        )
    if result.scale_rounding is not None:
        facts["scale folded in"] = "bit-exact" if result.scale_rounding == 0 else f"rounds {result.scale_rounding:.1e}"
    if result.selection_agreement is not None:
        facts["experts chosen alike"] = f"{result.selection_agreement:.3%}, gates off 1/K by {result.gate_error:.1e}"
    if result.identical_to_source is not None:
        facts["the source, bit for bit"] = result.identical_to_source
    if result.memory_bytes is not None:
        facts["weights in memory"] = gigabytes(result.memory_bytes)
    if result.bits_per_weight is not None:
        facts["bits per weight"] = f"{result.bits_per_weight:.2f}"
    facts |= {
        "on disk": f"{gigabytes(result.bytes)} in {result.files} files",
        "time": f"{result.seconds:.1f} s",
        "written to": result.path,
    }
    if result.commit is not None:
        facts["pushed as"] = result.commit
    table = facts_table(f"Exported {result.notation}", facts)
    show(result, output=output, tables=[table], closing=_next_steps(result))


def _next_steps(result: ExportResult) -> list[str]:
    first, *others = result.next_steps
    return [f"Next: {first}", *(f"      {step}" for step in others)]
