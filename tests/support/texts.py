"""A tokenizer made on the fly, documents that differ, and a short way to build blocks of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from factorctl.data.blocks import TokenBlocks
from factorctl.data.building import build_token_blocks
from factorctl.data.spec import parse_data_spec

BOS, EOS, WORDS = 1, 2, 500


def make_tokenizer(words: int = WORDS, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... are the ids 3, 4, ...; BOS in front as Llama does, EOS known and not added."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {f"w{i}": i + 3 for i in range(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def document_text(number: int, length: int) -> str:
    """Documents that differ: the first word is the document's number, the rest counts up from it."""
    return " ".join(f"w{(number + i) % WORDS}" for i in range(length))


def write_documents(path: Path, lengths: list[int], first: int = 0) -> str:
    rows = [json.dumps({"text": document_text(first + n, length)}) for n, length in enumerate(lengths)]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def build(data: str, cache: Path, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> TokenBlocks:
    options: dict[str, Any] = {"block_length": 16, "tokens": 160, "seed": 0, "heldout_fraction": 0.2} | changes
    return build_token_blocks(parse_data_spec(data), tokenizer or make_tokenizer(), cache_dir=cache, **options)
