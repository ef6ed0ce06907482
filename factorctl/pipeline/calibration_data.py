"""The calibration tokens of a dense source: from text, or sampled from the model itself."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from factorctl.checkpoint.hashing import hash_value
from factorctl.checkpoint.sources import Source
from factorctl.config import FactorizeConfig
from factorctl.data.blocks import TokenBlocks
from factorctl.data.building import build_token_blocks
from factorctl.data.sampling import ModelSampler
from factorctl.data.spec import parse_data_spec
from factorctl.errors import UsageError
from factorctl.models.loading import load_dense
from factorctl.pipeline.workspace import cache_directory
from factorctl.progress import Progress

BLOCK_LENGTH = 512


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The source's tokenizer.

    Raises:
        UsageError: there is none, or transformers cannot read it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path)
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(
            f"{source.path} has no tokenizer that transformers can read: {str(error).splitlines()[0]}",
            "add the model's tokenizer files, or choose options that need no calibration (--router random)",
        ) from None
    return tokenizer


def calibration_blocks(
    source: Source, description: dict[str, Any], config: FactorizeConfig, progress: Progress
) -> TokenBlocks:
    """Token blocks for `config.calibration`, from the cache where they were made before."""
    tokenizer = load_tokenizer(source)
    sampler = ModelSampler(
        load_model=lambda: load_dense(source.path),
        model_hash=hash_value(description["files"]),
        tokenizer=tokenizer,
        document_length=BLOCK_LENGTH,
    )
    if config.calibration == "self":
        progress.note("calibrating on text sampled from the model itself; give --calibration DATA for your own")
    return build_token_blocks(
        parse_data_spec(config.calibration, option="--calibration"),
        tokenizer,
        block_length=BLOCK_LENGTH,
        tokens=config.calibration_tokens,
        seed=config.seed,
        cache_dir=cache_directory() / "blocks",
        heldout_fraction=0,
        max_document_tokens=2 * BLOCK_LENGTH,
        sampler=sampler,
        progress=progress,
    )
