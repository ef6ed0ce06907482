"""`finetune --routing domain`: which experts each domain of the training text gets, and how a checkpoint keeps that."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.data.blocks import TokenBlocks
from factorctl.data.tokenizing import tokenize_documents
from factorctl.ffn.spec import DomainRouting
from factorctl.models.building import add_domain_experts
from factorctl.models.domain_fit import READ_PER_TOKEN, TEXT_TOKENS, DomainText, fit_domains
from factorctl.models.domains import choose_by_domain, domains_of
from factorctl.models.families import ffn_prefix
from factorctl.pipeline.common.devices import storage_dtype
from factorctl.pipeline.finetune.model import load_tokenizer
from factorctl.pipeline.finetune.plan import FinetunePlan
from factorctl.progress import Progress
from factorctl.training.distiller import Distiller
from factorctl.training.twin_ffn import twins

FITTED_TOKENS = 16_384
"""Tokens of the training text on which experts are chosen."""


def route_by_domain(plan: FinetunePlan, distiller: Distiller, blocks: TokenBlocks, progress: Progress) -> None:
    """Let the student choose by domain: as the checkpoint has it, or as the training text tells, before any step.

    The choice is a function of checkpoint, text and seed, so a resumed run makes the same.
    """
    model, layers = distiller.model, twins(distiller.model)
    students = [twin.student for twin in layers]
    if (domains := domains_of(model)) is not None:
        choose_by_domain(model, domains, [student.get_buffer("domain_experts") for student in students], students)
        return
    with progress.stage("Choosing experts by domain"):
        fit = fit_domains(
            model,
            _texts(plan, blocks, progress),
            min(FITTED_TOKENS, plan.batch.tokens),
            students,
            lambda layer, _: layers[layer].teacher,
            seed=plan.config.seed,
        )
    progress.note(f"experts are chosen for {', '.join(fit.domains.names)}")
    stored = storage_dtype(plan.config.dtype, CheckpointReader(plan.checkpoint.path).matrix_dtype)
    for buffer in fit.domains.buffers():
        buffer.copy_(buffer.to(stored))  # what is trained is what will be loaded
    model.model.domains = fit.domains
    for student, experts_MK in zip(students, fit.experts_LMK, strict=True):
        count, top_k = experts_MK.shape
        add_domain_experts(student, count, top_k, experts_MK.device)
        student.get_buffer("domain_experts").copy_(experts_MK)


def _texts(plan: FinetunePlan, blocks: TokenBlocks, progress: Progress) -> list[DomainText]:
    """The beginning of the training text, document by document; blocks of `self`, which names no domain."""
    tokens = READ_PER_TOKEN * min(FITTED_TOKENS, plan.batch.tokens)
    if plan.data.uses_self:
        rows = blocks.train[: max(1, tokens // blocks.block_length)]
        return [DomainText(row, None) for row in rows.astype("int64").tolist()]
    found = tokenize_documents(
        plan.data,
        load_tokenizer(plan),
        max_tokens=tokens,
        max_document_tokens=TEXT_TOKENS,
        seed=plan.config.seed,
        progress=progress,
    )
    return [DomainText(document.ids, document.domain) for document in found]


def with_domains(plan: FinetunePlan, distiller: Distiller) -> FinetunePlan:
    """The plan whose result is described by the domains that its model knows, where it knows any."""
    domains = domains_of(distiller.model)
    if domains is None:
        return plan
    return replace(plan, spec=replace(plan.spec, domains=DomainRouting(domains.names, plan.spec.shape.top_k)))


def domain_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint that chooses by domain holds beside its weights, routers of zeros included."""
    domains = domains_of(model)
    if domains is None:
        return {}
    tensors = {"model.domains.mean": domains.mean, "model.domains.centres": domains.centres}
    for layer, twin in enumerate(twins(model)):
        tensors[f"{ffn_prefix(layer)}.domain_experts"] = twin.student.get_buffer("domain_experts")
        tensors[f"{ffn_prefix(layer)}.router"] = torch.zeros_like(twin.student.router)
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
