"""recipe.toml: the chosen split as a recipe that `factorctl run` carries out."""

from __future__ import annotations

import json
from pathlib import Path

from factorctl.pipeline.common.workspace import output_path
from factorctl.pipeline.frontier.plan import FrontierPlan
from factorctl.pipeline.frontier.points import Point
from factorctl.pipeline.frontier.splits import name_of


def recipe_text(plan: FrontierPlan, point: Point, head: list[str]) -> str:
    """Factorize as the search did, evaluate on the same text, profile as speed was measured, export.

    Args:
        head: lines of comment: what was promised.
    """
    config, base = plan.config, plan.factorize_config(point.shape)
    factorize: dict[str, object] = {
        "model": base.model,
        "revision": base.revision,
        "experts": base.num_experts,
        "top-k": base.top_k,
        "shared-fraction": base.shared_fraction,
        "strategy": base.strategy,
        "router": base.router,
        "scale": base.scale,
        "refit": base.refit,
        "calibration": base.calibration,
        "calibration-tokens": base.calibrated_on,
        "text-field": base.text_field,
    }
    tables = {"factorize": factorize}
    if config.data is not None:
        window = {"window": plan.window, "document-tokens": plan.window}
        data = {"data": config.data, "data-tokens": config.data_tokens, "text-field": config.text_field}
        tables["eval"] = {**data, **window}
    tables["profile"] = {
        "batch": config.batch,
        "prompt": config.prompt,
        "data": config.data,
        "text-field": None if config.data is None else config.text_field,
    }
    if point.export_target != "native":
        tables["export"] = {"to": point.export_target}
    common = {
        "name": output_path(None, Path(), base.model, name_of(point.shape)).name.replace("+", "-"),
        "seed": config.seed,
        "device": config.device,
        "dtype": config.dtype,
    }
    more = "More calibration-tokens make it better than promised; finetune, another table, makes it better still."
    lines = [*(f"# {line}" for line in [*head, more]), "", *_keys(common)]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_keys(table)]
    return "\n".join(lines) + "\n"


def _keys(table: dict[str, object]) -> list[str]:
    """`key = value` for every value that is set; TOML writes these as JSON does."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items() if value is not None]
