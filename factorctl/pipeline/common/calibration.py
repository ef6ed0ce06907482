"""The calibration tokens of a dense source: from text, or sampled from the model itself."""

from __future__ import annotations

from typing import Any

from factorctl.checkpoint.sources import Source
from factorctl.config.factorize import FactorizeConfig
from factorctl.data.blocks import TokenBlocks
from factorctl.data.building import build_token_blocks
from factorctl.data.sampling import ModelSampler
from factorctl.data.spec import parse_data_spec
from factorctl.errors import UsageError
from factorctl.files.cache import cache_directory
from factorctl.files.hashing import hash_value
from factorctl.models.families import DenseModel
from factorctl.models.loading import load_dense
from factorctl.pipeline.common.source_tokenizer import ADD_TOKENIZER
from factorctl.pipeline.common.tokenizers import load_tokenizer
from factorctl.progress import Progress

BLOCK_LENGTH = 512
FEW_PER_INPUT = 2
"""Tokens per input of a router below which what is fitted to them is worth a warning."""


def calibration_blocks(
    source: Source, dense: DenseModel, description: dict[str, Any], config: FactorizeConfig, progress: Progress
) -> TokenBlocks:
    """Token blocks for `config.calibration`, with a word on where they come from when nobody gave text.

    Raises:
        UsageError: no tokenizer, one of another model, or no text.
    """
    if config.calibration == "self":
        progress.note("calibrating on text sampled from the model itself; give --calibration DATA for your own")
    blocks = source_blocks(source, dense, description, config, progress)
    if blocks.train.size < FEW_PER_INPUT * dense.hidden_size:
        progress.note(
            f"calibrated on {blocks.train.size:,} tokens (whole blocks), for routers of {dense.hidden_size:,} inputs: "
            f"so few say little about other text; give --calibration-tokens {FEW_PER_INPUT * dense.hidden_size} or more"
        )
    return blocks


def source_blocks(
    source: Source, dense: DenseModel, description: dict[str, Any], config: FactorizeConfig, progress: Progress
) -> TokenBlocks:
    """Token blocks for `config.calibration`, from the cache where they were made before; raises the same."""
    tokenizer = load_tokenizer(source.path, hint=ADD_TOKENIZER, rows=int(dense.config.vocab_size))
    block_length = calibration_block_length(dense)
    sampler = ModelSampler(
        load_model=lambda: load_dense(source.path),
        model_hash=hash_value(description["files"]),
        tokenizer=tokenizer,
        document_length=block_length,
    )
    blocks = build_token_blocks(
        parse_data_spec(config.calibration, text_field=config.text_field, option="--calibration"),
        tokenizer,
        block_length=block_length,
        tokens=config.calibrated_on,
        seed=config.seed,
        cache_dir=cache_directory() / "blocks",
        heldout_fraction=0,
        max_document_tokens=2 * block_length,
        sampler=sampler,
        progress=progress,
    )
    largest, vocabulary = int(blocks.train.max()), int(dense.config.vocab_size)
    if largest >= vocabulary:
        raise UsageError(
            f"the tokenizer in {source.path} gives token {largest}; the model knows {vocabulary} tokens",
            "its tokenizer files belong to another model: put the right ones there",
        )
    return blocks


def calibration_block_length(dense: DenseModel) -> int:
    """Tokens of a block, and of a document of `self`."""
    return BLOCK_LENGTH if dense.context is None else min(BLOCK_LENGTH, dense.context)
