"""The tokens that decide a profile's routing: real text, because random tokens spread over experts as no text does."""

from __future__ import annotations

import torch

from factorctl.config.profile import ProfileConfig
from factorctl.data.building import build_token_blocks
from factorctl.data.sampling import ModelSampler
from factorctl.data.spec import parse_data_spec
from factorctl.files.cache import cache_directory
from factorctl.models.loading import NativeCheckpoint, load
from factorctl.pipeline.common.tokenizers import load_tokenizer
from factorctl.progress import Progress

RANDOM = "random"
TEXT_TOKENS = 4096
BLOCK_LENGTH = 256


def profile_text(
    config: ProfileConfig, checkpoint: NativeCheckpoint, remarks: list[str], progress: Progress
) -> tuple[torch.Tensor, str]:
    """A stream of token ids [n], and what to call it in the report.

    Raises:
        UsageError: the text cannot be found, or the checkpoint has no tokenizer for it.
    """
    wanted = max(TEXT_TOKENS, 2 * (max(config.prompt) + config.decode_tokens))
    if config.data == RANDOM:
        remarks.append("random tokens decide the routing: expert load and hits are not those of text")
        generator = torch.Generator().manual_seed(config.seed)
        vocabulary = int(checkpoint.dense.config.vocab_size)
        return torch.randint(vocabulary, (wanted,), generator=generator), "random tokens"
    return _text_tokens(config, checkpoint, wanted, progress), f"text: {config.data}"


def _text_tokens(config: ProfileConfig, checkpoint: NativeCheckpoint, wanted: int, progress: Progress) -> torch.Tensor:
    hint = "use --data random to profile without text"
    tokenizer = load_tokenizer(checkpoint.path, hint=hint, config=checkpoint.dense.config)
    sampler = ModelSampler(
        load_model=lambda: load(checkpoint.path, top_k=checkpoint.spec.shape.num_experts, verify=False),
        model_hash=checkpoint.manifest.sha256,
        tokenizer=tokenizer,
        document_length=BLOCK_LENGTH,
    )
    if config.data == "self":
        progress.note("routing text is sampled from the model itself, all experts on; give --data for your own")
    blocks = build_token_blocks(
        parse_data_spec(config.data, text_field=config.text_field),
        tokenizer,
        block_length=BLOCK_LENGTH,
        tokens=wanted,
        seed=config.seed,
        cache_dir=cache_directory() / "blocks",
        heldout_fraction=0,
        max_document_tokens=4 * BLOCK_LENGTH,
        allow_fewer=True,
        purpose="profiling",
        sampler=sampler,
        progress=progress,
    )
    return torch.from_numpy(blocks.train.reshape(-1).astype("int64"))
