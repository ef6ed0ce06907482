"""`factorctl inspect`, `verify`, `plugins` and `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from factorctl.cli.options import CheckpointArg, FormatOpt, QuietOpt, WorkspaceOpt
from factorctl.config.common import DEFAULT_WORKSPACE
from factorctl.errors import ExitCode


def inspect(
    checkpoint: CheckpointArg = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Show one layer's experts: sizes and shares.")] = None,
    workspace: WorkspaceOpt = DEFAULT_WORKSPACE,
    output: FormatOpt = "text",
) -> None:
    """Say what a checkpoint is, what it was made from and how."""
    from factorctl.cli.render import facts_table, gigabytes, rows_table, show
    from factorctl.pipeline.common.workspace import newest_checkpoint
    from factorctl.pipeline.inspect.inspect import inspect_checkpoint, inspect_layer

    path = checkpoint or newest_checkpoint(workspace)
    if layer is not None:
        found = inspect_layer(path, layer)
        columns = ["expert", "neurons", "down_share", "gate_share", "router_norm"]
        rows = [[group[column] for column in columns] for group in found.groups]
        tables = [rows_table(f"Layer {layer} of {path}", columns, rows)]
        if found.record:
            tables.append(facts_table("Recorded when it was made", found.record))
        show(found, output=output, tables=tables)
        return
    result = inspect_checkpoint(path)
    factored, source, strategy = result.factored, result.source, result.strategy
    facts: dict[str, object] = {
        "kind": f"{result.kind}, made by {result.stage}",
        "notation": factored.get("notation"),
        "experts": f"{factored['num_experts']} of {factored['expert_size']} neurons, {factored['top_k']} active",
        **({"chosen by domain": ", ".join(domains["names"])} if (domains := factored.get("domains")) else {}),
        "shared neurons": factored["shared_size"],
        "active FFN": f"{factored.get('active_ffn_fraction', 0):.1%}",
        "gate, scale": f"{factored['gate']}, {factored['scale']}",
        "layers": len(result.layers) or None,
        "source": f"{source['id']} ({source['kind']}, {source.get('model_type')})",
        "source revision": source.get("revision"),
        "parent manifest": result.parent or "none: made from the dense source",
        "strategy": f"{strategy.get('name')} {strategy.get('version')}" if strategy else None,
        "strategy reference": strategy.get("reference"),
        "identity error": result.identity_error,
        "calibration": _calibration(result.calibration) if result.stage == "factorize" else None,
        "largest load": None if result.largest_load is None else f"{result.largest_load:.1f} even shares",
        "idle experts": _idle(result.idle_experts),
        "files": f"{result.files}, {gigabytes(result.bytes)}",
        "manifest sha256": result.manifest_sha256,
        "libraries": ", ".join(f"{name} {version}" for name, version in result.libraries.items()),
    }
    known = {name: fact for name, fact in facts.items() if fact is not None}
    show(result, output=output, tables=[facts_table(str(path), known)])


def _idle(experts: list[tuple[int, int]] | None) -> str | None:
    if experts is None:
        return None
    if not experts:
        return "none"
    named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:4])
    more = f" and {len(experts) - 4} more" if len(experts) > 4 else ""
    return f"{len(experts)}, holding what hardly any token needs: {named}{more}"


def _calibration(calibration: dict[str, object] | None) -> str:
    if calibration is None:
        return "none was needed"
    return f"{calibration['tokens']:,} tokens, fingerprint {str(calibration['fingerprint'])[:16]}"


def verify(
    checkpoint: CheckpointArg = None,
    identity: Annotated[
        bool, typer.Option("--identity", help="Also run every layer with all experts on against its dense form.")
    ] = False,
    workspace: WorkspaceOpt = DEFAULT_WORKSPACE,
    output: FormatOpt = "text",
    quiet: QuietOpt = False,
) -> None:
    """Check every file of a checkpoint or export against its manifest. Exit code 3 if one is not as promised."""
    from factorctl.cli.render import gigabytes, progress_listener, show
    from factorctl.pipeline.common.workspace import newest_checkpoint
    from factorctl.pipeline.inspect.verify import verify_checkpoint

    path = checkpoint or newest_checkpoint(workspace)
    result = verify_checkpoint(path, identity=identity, progress=progress_listener(quiet=quiet))
    lines = [f"{path} is whole: {result.files} files, {gigabytes(result.bytes)}, all hashes match"]
    if result.tensors is not None:
        lines.append(f"{result.tensors} tensors, every one accounted for")
    if result.identity_error is not None:
        dense = "dense" if result.holds_dense_values else "the same neurons in one dense FFN"
        changed = "" if result.holds_dense_values else "; they are no longer the source's, after a refit or training"
        lines.append(f"all experts on against {dense}: relative error {result.identity_error:.1e}{changed}")
    show(result, output=output, closing=lines)


def plugins(output: FormatOpt = "text") -> None:
    """List partition strategies, their options and references, and the model aliases. Names broken plugins."""
    from factorctl.cli.render import rows_table, show
    from factorctl.pipeline.inspect.installation import list_plugins

    found = list_plugins()
    rows = [
        [info.name, f"{info.distribution} {info.version}", ", ".join(info.options), info.error or info.reference]
        for info in found.strategies
    ]
    tables = [
        rows_table("Partition strategies", ["name", "from", "options", "reference, or what is wrong with it"], rows),
        rows_table("Model aliases", ["alias", "stands for"], list(found.aliases.items())),
    ]
    show(found, output=output, tables=tables)
    if any(info.error for info in found.strategies):
        raise typer.Exit(ExitCode.FAILED)


def doctor(workspace: WorkspaceOpt = DEFAULT_WORKSPACE, output: FormatOpt = "text") -> None:
    """Report versions, devices, the CPU kernel, free disk and memory, and whether the hub can be reached."""
    from factorctl.cli.render import facts_table, gigabytes, show
    from factorctl.pipeline.inspect.installation import diagnose

    found = diagnose(workspace)
    facts: dict[str, object] = {
        "factorctl": found.factorctl,
        "python": found.python,
        "platform": found.platform,
        **found.libraries,
        "cpu": f"{found.cpu}, {found.cores} cores, bfloat16 {'yes' if found.bf16_on_cpu else 'no'}",
        "cpu kernel": "compiled" if found.no_kernel is None else f"none, torch computes alone: {found.no_kernel}",
        "cuda": ", ".join(found.cuda_devices) or "none",
        "memory": f"{gigabytes(found.memory_available_bytes)} of {gigabytes(found.memory_bytes)} available",
        "disk": f"{gigabytes(found.disk_free_bytes)} free at {workspace}",
        "hub": found.hub,
        "cache": found.cache,
    }
    show(found, output=output, tables=[facts_table("This machine", facts)])
