"""Native checkpoints to export, and a way to ask stock transformers about many exports at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from support.tiny import SPECIAL, calibrated, factorize_quietly, make_source, weights_only
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from factorctl.checkpoint.reader import CheckpointReader
from factorctl.config.export import ExportConfig
from factorctl.exporting.check.native import native_run, plain
from factorctl.exporting.check.stock import StockAnswer, StockJob, ask_stock
from factorctl.exporting.check.text import PASSAGES
from factorctl.exporting.jobs import Verified
from factorctl.exporting.stock.writer import SafetensorsWriter
from factorctl.models.loading import open_checkpoint
from factorctl.pipeline.export import run as pipeline
from factorctl.progress import SilentProgress

GGUF_VOCAB = 300
SEQUENCES = [[5, 9, 17, 4, 22, 8, 11, 30, 6, 7, 19, 25], [28, 12, 6, 6, 15, 24, 10, 21]]


def make_native(
    directory: Path, case: str, text: Path, *, shared: bool = False, source: Path | None = None, **changes: Any
) -> Path:
    """A native checkpoint with a random router, of a source made here unless one is given."""
    dense = source or make_source(directory / f"{case}-dense", case)
    out = (
        directory / f"{case}-{'shared' if shared else 'routed'}-{changes.get('top_k', 2)}-{changes.get('gate', 'soft')}"
    )
    plain = {"router": "random", "scale": "sum", "refit": False, "shared_fraction": 0.34}
    config = calibrated(dense, out, text, **{**plain, **changes}) if shared else weights_only(dense, out, **changes)
    factorize_quietly(config)
    return out


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over all bytes with a few merges, as llama.cpp reads it (it demands merges)."""
    ids = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("Ġ", "the"), ("Ġ", "a"), ("o", "u")]
    ids |= {left + right: len(ids) + index for index, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def make_gguf_source(directory: Path, case: str, **changes: Any) -> Path:
    """A dense source whose tokenizer llama.cpp can run; its embedding has a few unused rows."""
    make_source(directory, case, vocab_size=GGUF_VOCAB, **changes)
    byte_tokenizer().save_pretrained(directory)
    return directory


def sentencepiece_source(directory: Path) -> Path:
    """A dense source with a SentencePiece tokenizer, as Llama 2 has: tokenizer.model and tokenizer.json."""
    import sentencepiece

    make_source(directory, "llama", vocab_size=424)
    corpus, prefix = directory.with_name("corpus.txt"), directory / "tokenizer"
    corpus.write_text("\n".join(PASSAGES * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(prefix),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    prefix.with_suffix(".vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(prefix.with_suffix(".model")))
    _fast_twin(pieces).save_pretrained(directory)
    return directory


def _fast_twin(pieces: Any) -> PreTrainedTokenizerFast:
    """tokenizer.json of a SentencePiece BPE: each way to put a piece together is a merge."""
    vocab = {pieces.IdToPiece(index): index for index in range(pieces.vocab_size())}
    merges = [
        pair
        for piece in vocab
        for pair in sorted(
            ((piece[:cut], piece[cut:]) for cut in range(1, len(piece))),
            key=lambda pair: [vocab.get(part, 0) for part in pair],
        )
        if not piece.startswith("<") and all(part in vocab for part in pair)
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def export_unchecked(config: ExportConfig) -> pipeline.ExportResult:
    """Export without starting the stock engine: the test asks it once, for many exports."""
    with mock.patch.object(SafetensorsWriter, "verify", return_value=Verified("nothing", None)):
        return pipeline.export(config, SilentProgress())


def ask_about(directories: Mapping[str, Path], **changes: Any) -> dict[str, StockAnswer]:
    """What stock transformers computes for each of them, in one process that cannot import factorctl."""
    jobs = [
        dataclasses.replace(StockJob(path, "float32", plain(SEQUENCES)), **changes) for path in directories.values()
    ]
    return dict(zip(directories, ask_stock(jobs), strict=True))


def largest_difference(native: Path, answer: StockAnswer, *, top_k: int | None = None) -> float:
    """Between the native checkpoint's logits and the stock engine's."""
    checkpoint = open_checkpoint(native, verify=False)
    spec = checkpoint.spec if top_k is None else checkpoint.spec.with_top_k(top_k)
    ours = native_run(checkpoint.dense, spec, CheckpointReader(native).read, plain(SEQUENCES)).logits
    return max(float((a - b).abs().max()) for a, b in zip(ours, answer.logits, strict=True))
