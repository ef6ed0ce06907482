"""README.md of an export: where it came from, what was checked, how to run it. And what to type once it is there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from factorctl.checkpoint.manifest import Manifest
from factorctl.config.export import ExportConfig
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.option import command_line
from factorctl.exporting.check.comparison import Agreement, Proof
from factorctl.exporting.check.rounding import Rounding
from factorctl.exporting.forms import Form
from factorctl.exporting.gguf.file import GGUF_NAME

_STAGES: Mapping[str, type] = {"factorize": FactorizeConfig, "finetune": FinetuneConfig}
"""What makes a native checkpoint."""
METHOD = "https://arxiv.org/abs/2408.11855"
_LIMITS = "more engines and their limits: docs/serve.md"


@dataclass(frozen=True)
class CardFacts:
    """What the card says beyond the parent's manifest."""

    config: Mapping[str, Any]
    """Of the export, resolved."""
    architecture: str
    dtype: str
    engine: str
    """What the export was compared in."""
    agreement: Agreement | None
    name: str
    """Of the dense source, to read."""
    notes: Sequence[str] = ()
    proof: Proof | None = None
    rounding: Rounding | None = None
    memory_bytes: int | None = None
    """Of the loaded weights, where the engine says it."""
    gguf_file: str | None = None
    bits_per_weight: float | None = None
    needs_factorctl: bool = False
    """Whether `factorctl.load` has to load it: experts that are routed and quantised."""
    licence: str | None = None
    """As the source names it; None where nothing says it."""
    licence_files: Sequence[str] = ()
    loads_eagerly: bool = False
    """Whether transformers' default kernel for experts refuses it."""
    results: Sequence[EvalResult] = ()
    """Figures of reports on the parent checkpoint, for the front matter."""
    reports: Mapping[str, str] = field(default_factory=dict)
    """Title -> Markdown table, from reports on the parent checkpoint."""


def export_card(parent: Manifest, facts: CardFacts) -> str:
    """A model card; the same facts give the same text."""
    sections = [
        _front_matter(parent, facts),
        _what_it_is(parent, facts),
        _checked(facts),
        _usage(facts),
        *(f"## {title}\n\n{table}" for title, table in facts.reports.items()),
        _made_with(parent, facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_data(
    source: Mapping[str, Any],
    *,
    name: str,
    library: str,
    licence: str | None = None,
    results: Sequence[EvalResult] = (),
) -> ModelCardData:
    """The front matter of a card: what the source says of itself, and what was measured."""
    own = {"license": licence, **(source.get("card") or {})}
    origin = own.pop("base_model", None)
    base_model = source["id"] if source.get("kind") == "hub" else origin
    return ModelCardData(
        base_model=base_model,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "factorctl"],
        model_name=name,
        eval_results=list(results) or None,
        **own,
    )


def _front_matter(parent: Manifest, facts: CardFacts) -> str:
    library = "gguf" if facts.gguf_file else "transformers"
    data = card_data(
        parent.source, name=_title(parent, facts), library=library, licence=facts.licence, results=facts.results
    )
    return f"---\n{data.to_yaml()}\n---"


def _title(parent: Manifest, facts: CardFacts) -> str:
    factored, name = parent.factored, facts.name
    if facts.config["target"] == "dense":
        return f"{name}, pruned to {factored['shared_size']} neurons" if factored["top_k"] == 0 else f"{name}, dense"
    return f"{name} as a mixture of experts, {factored['notation']}"


def _what_it_is(parent: Manifest, facts: CardFacts) -> str:
    factored, source = parent.factored, parent.source
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    if facts.config["target"] == "dense" and factored["top_k"]:
        what = "put back together: all experts are always on."
    elif factored["top_k"] == 0:
        what = f"cut down to the {factored['shared_size']} most important neurons of every feed-forward network."
    else:
        what = (
            f"split into a mixture of experts ({factored['notation']}): {factored['num_experts']} experts of "
            f"{factored['expert_size']} neurons, {factored['top_k']} of them active per token, beside "
            f"{factored['shared_size']} shared neurons that are always on; "
            f"{factored['active_ffn_fraction']:.1%} of the feed-forward neurons work for a token."
        )
    files = f"see {', '.join(facts.licence_files)}" if facts.licence_files else None
    licence = facts.licence or files or "that of the base model, which did not carry a licence file"
    return "\n".join(
        [
            f"# {_title(parent, facts)}",
            "",
            f"- Base model: {source['id']}{revision}, {what}",
            f"- Method: [FactorLLM]({METHOD}), by factorctl {parent.tool_version} ({parent.stage}); gate "
            f"`{factored['gate']}`, scale `{factored['scale']}`.",
            _format(facts),
            f"- Licence: {licence}.",
            *(f"- {note[0].upper()}{note[1:]}." for note in facts.notes),
        ]
    )


def _format(facts: CardFacts) -> str:
    held = "" if facts.memory_bytes is None else f", {facts.memory_bytes / 1e6:.1f} MB of memory when loaded"
    if facts.bits_per_weight is not None:
        held = f" ({facts.bits_per_weight:.2f} bits a weight)"
    code = "loaded by `factorctl.load`, as the stock class" if facts.needs_factorctl else "no custom code"
    return (
        f"- Format: {facts.config['target']}, architecture `{facts.architecture}`, {facts.dtype} weights{held}, {code}."
    )


def _checked(facts: CardFacts) -> str:
    if facts.agreement is None:
        return "## Compared with the native checkpoint\n\nNot run: every tensor was read back and compared instead."
    agreement = facts.agreement
    sentences = [
        f"On {agreement.tokens} tokens, in {facts.engine}: largest logit difference {agreement.max_logit_error:.2g}, "
        f"same most likely token {agreement.top1_agreement:.2%}, KL {agreement.kl:.2g} nats."
    ]
    if facts.proof is not None:
        sentences += _proven(facts.proof)
    if facts.rounding is not None and facts.rounding.changed_choices:
        sentences.append(
            f"Rounding to {facts.dtype} sends tokens to other experts in {facts.rounding.changed_choices:.2%} of the "
            f"routing decisions; with the same experts it would leave KL {facts.rounding.kl_same_experts:.2g}."
        )
    return "## Compared with the native checkpoint\n\n" + " ".join(sentences)


def _proven(proof: Proof) -> list[str]:
    """What was judged, against a native model of the values in this directory."""
    found = []
    if proof.all_experts_error is not None:
        found.append(
            "With every expert on, where no routing decision can fall the other way, its logits are those of its "
            f"values to {proof.all_experts_error:.1g} of their spread."
        )
    if proof.served_error is not None and proof.near_ties:
        found.append(
            f"As it is served they are to {proof.served_error:.1g} on the {proof.judged_tokens} tokens before the "
            f"first decision of a sequence that is nearer to a tie than the engine's rounding; "
            f"{proof.near_ties:.2%} of the decisions are."
        )
    return found


def _usage(facts: CardFacts) -> str:
    if facts.gguf_file:
        return (
            "## Use\n\n```sh\n"
            f'llama-cli -m {facts.gguf_file} -p "Once upon a time"\n'
            "ollama create my-model -f Modelfile && ollama run my-model\n```"
        )
    options = ', experts_implementation="eager"' if facts.loads_eagerly else ""
    loader = "factorctl.load" if facts.needs_factorctl else "AutoModelForCausalLM.from_pretrained"
    imports = (
        "import factorctl\nfrom transformers import AutoTokenizer"
        if facts.needs_factorctl
        else "from transformers import AutoModelForCausalLM, AutoTokenizer"
    )
    return (
        f"## Use\n\n```python\n{imports}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("PATH")\nmodel = {loader}("PATH"{options})\n'
        'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))\n```"
    )


def _made_with(parent: Manifest, facts: CardFacts) -> str:
    made_from = shlex.quote(str(parent.config.get("model") or "CHECKPOINT"))
    commands = [
        command_line(parent.stage, _STAGES[parent.stage], parent.config, positional=made_from),
        command_line("export", ExportConfig, facts.config, positional="CHECKPOINT"),
    ]
    return (
        "## How it was made\n\n```sh\n" + "\n".join(commands) + "\n```\n\n"
        f"`factorctl.json` ties this directory to its parent checkpoint (`{parent.sha256[:16]}`) and holds the full "
        "configuration and the sha256 of every file; `factorctl verify PATH` checks them."
    )


def next_steps(out: Path, form: Form, *, has_tokenizer: bool) -> list[str]:
    """Commands or Python for the export in `out`, the first to try first; the last line says where more stands.

    Each works with what was written; nothing only looks near.
    """
    if form.container == "gguf":
        model, modelfile = shlex.quote(str(out / GGUF_NAME)), shlex.quote(str(out / "Modelfile"))
        return [f"llama-cli -m {model}", f"ollama create NAME -f {modelfile}", _LIMITS]
    if form.quantised_experts:
        return [_in_python("import factorctl", f"factorctl.load({str(out)!r})"), _LIMITS]
    if "quantization_config" in form.config or not has_tokenizer:
        loading = f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
        return [_in_python("from transformers import AutoModelForCausalLM", loading), _LIMITS]
    return [f"vllm serve {shlex.quote(str(out))}", _LIMITS]


def _in_python(imported: str, called: str) -> str:
    return f"in Python: {imported}; model = {called}"
