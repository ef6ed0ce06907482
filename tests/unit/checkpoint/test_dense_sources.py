"""Dense checkpoints as people have them: saved from wrappers, with surplus, in several dtypes, beside adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from safetensors.torch import load_file, save_file
from support.tiny import directory_bytes, factorize_quietly, make_model, some_ids, weights_only

import factorctl
from factorctl.checkpoint.reader import CheckpointReader
from factorctl.checkpoint.sources import resolve
from factorctl.config.factorize import FactorizeConfig
from factorctl.errors import IntegrityError, UsageError
from factorctl.models.loading import load_dense
from factorctl.pipeline.common import tokenizers
from factorctl.pipeline.common.devices import compute_dtype
from factorctl.pipeline.common.workspace import output_path
from factorctl.pipeline.factorize.plan import plan_factorize
from factorctl.pipeline.factorize.run import factorize
from factorctl.progress import SilentProgress

Tensors = dict[str, torch.Tensor]
Changed = Callable[..., Path]


@pytest.fixture
def changed(dense_source: DenseSource, tmp_path: Path) -> Changed:
    """A copy of a tiny source with other tensors or another config."""

    def change(case: str = "llama", edit: Callable[[Tensors], Tensors] = dict, **config: object) -> Path:
        copy = Path(shutil.copytree(dense_source(case), tmp_path / "source"))
        tensors = edit(load_file(copy / "model.safetensors"))
        save_file({n: t.contiguous() for n, t in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
        raw = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**raw, **config}))
        return copy

    return change


def planned(source: Path, out: Path, **changes: object) -> tuple[FactorizeConfig, list[str]]:
    """What `--dry-run` would decide, and what it says."""
    progress = SilentProgress()
    plan = plan_factorize(weights_only(source, out, **changes), progress)
    return plan.config, progress.notes


# names


def bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "edit"),
    [
        ("llama-tied", bare),
        ("llama", bare),
        ("llama", lambda t: {f"_orig_mod.{name}": tensor for name, tensor in t.items()}),
        ("llama", lambda t: {f"module.{name}": tensor for name, tensor in t.items()}),
    ],
    ids=["base model", "base model and head", "compiled", "distributed"],
)
def test_names_of_base_models_and_wrappers(
    case: str, edit: Callable[[Tensors], Tensors], changed: Changed, tmp_path: Path
) -> None:
    source, expected = changed(case, edit), make_model(case)(some_ids()).logits
    assert torch.allclose(load_dense(source)(some_ids()).logits, expected, atol=1e-5)
    factorize_quietly(weights_only(source, tmp_path / "out"))
    assert torch.allclose(factorctl.load(tmp_path / "out", top_k=4)(some_ids()).logits, expected, atol=1e-4)


def test_a_base_model_without_its_head(changed: Changed, tmp_path: Path) -> None:
    source = changed(edit=lambda t: {n: v for n, v in bare(t).items() if n != "lm_head.weight"})
    with pytest.raises(UsageError, match=r"lacks lm_head\.weight .* saved without its head") as caught:
        planned(source, tmp_path / "out")
    assert "AutoModelForCausalLM" in str(caught.value.hint)


@pytest.mark.parametrize(("case", "architecture"), [("llama", "Llama"), ("llama-tied", "Llama"), ("qwen2", "Qwen2")])
def test_a_classifier_is_named(case: str, architecture: str, changed: Changed, tmp_path: Path) -> None:
    def classifier(tensors: Tensors) -> Tensors:
        body = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        return {**body, "score.weight": torch.zeros(2, 32)}

    source = changed(case, classifier, architectures=[f"{architecture}ForSequenceClassification"])
    with pytest.raises(UsageError, match=rf"holds a {architecture}ForSequenceClassification, no causal.*score\.weight"):
        planned(source, tmp_path / "out")


@pytest.mark.parametrize("listed", [False, True], ids=["stored, not listed", "listed, not stored"])
def test_rotary_frequencies_may_be_missing_on_one_side_of_the_index(
    listed: bool, changed: Changed, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = changed(edit=lambda t: t if listed else {**t, name: torch.ones(4)})
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    names = set(load_file(source / "model-00001-of-00001.safetensors")) ^ {name}
    index = {"weight_map": dict.fromkeys(sorted(names), "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    factorize_quietly(weights_only(source, tmp_path / "out"))
    assert name not in CheckpointReader(tmp_path / "out").entries
    index["weight_map"].pop("model.norm.weight")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"holds tensor model\.norm\.weight, which .* does not list") as caught:
        CheckpointReader(source)
    assert "different versions" in str(caught.value.hint)


# dtypes


def embedding_in_bfloat16(tensors: Tensors) -> Tensors:
    return {name: t.bfloat16() if "embed_tokens" in name else t for name, t in tensors.items()}


def test_matrices_of_several_dtypes_take_the_one_that_holds_all(changed: Changed, tmp_path: Path) -> None:
    source = changed(edit=embedding_in_bfloat16)
    config, notes = planned(source, tmp_path / "out")
    assert config.dtype == "float32"
    assert "weights are stored in bfloat16 and float32: all are kept in float32, exactly" in notes[-1]
    assert compute_dtype("auto", source, torch.device("cpu"), []) == torch.float32
    factorize_quietly(weights_only(source, tmp_path / "out"))
    made = CheckpointReader(tmp_path / "out")
    assert {entry.dtype for entry in made.entries.values()} == {torch.float32, torch.int32}
    kept = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(made.read("model.embed_tokens.weight"), kept.float())
    assert factorctl.load(tmp_path / "out")(some_ids()).logits.isfinite().all()


def test_the_two_half_precisions_meet_in_float32(changed: Changed, tmp_path: Path) -> None:
    source = changed(edit=lambda t: {n: v.bfloat16() if "embed" in n else v.half() for n, v in t.items()})
    assert planned(source, tmp_path / "out")[0].dtype == "float32"
    assert planned(source, tmp_path / "out", dtype="bfloat16")[0].dtype == "bfloat16"


@torch.no_grad()
def test_norms_in_float32_beside_matrices_in_bfloat16(changed: Changed, tmp_path: Path) -> None:
    source = changed(edit=lambda t: {n: v if v.ndim == 1 else v.bfloat16() for n, v in t.items()})
    assert planned(source, tmp_path / "out")[0].dtype == "auto"
    assert load_dense(source)(some_ids()).logits.dtype == torch.bfloat16
    factorize_quietly(weights_only(source, tmp_path / "out"))
    assert CheckpointReader(tmp_path / "out").entry("model.norm.weight").dtype == torch.float32
    assert factorctl.load(tmp_path / "out").dtype == torch.bfloat16
    assert factorctl.load(tmp_path / "out")(some_ids()).logits.isfinite().all()


# what lies beside the weights


def test_an_adapter_and_code_of_its_own_are_noted(changed: Changed, tmp_path: Path) -> None:
    source = changed(auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"}, architectures=["XForCausalLM"])
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.zeros(1)}, source / "adapter_model.safetensors")
    progress = SilentProgress()
    factorize(weights_only(source, tmp_path / "out"), progress)
    assert any("holds an adapter (adapter_config.json), which is not applied" in note for note in progress.notes)
    assert any("names code of its own (modeling_x.XForCausalLM), which is not run" in note for note in progress.notes)


def test_a_shard_that_is_no_safetensors_file_is_called_what_it_is(changed: Changed, tmp_path: Path) -> None:
    source = changed()
    (source / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(IntegrityError, match=r"model\.safetensors is a git-lfs pointer") as caught:
        planned(source, tmp_path / "out")
    assert "git lfs pull --include model.safetensors" in str(caught.value.hint)


def test_the_directory_at_hand_has_a_name(
    dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(dense_source(), tmp_path / "my-model"))
    monkeypatch.chdir(home)
    for model in (".", "../my-model/", str(home)):
        assert output_path(None, Path("runs"), model, "1R4E2K") == Path("runs/my-model-1R4E2K")
    assert output_path(None, Path("runs"), "org/name", "1R4E2K") == Path("runs/name-1R4E2K")


def test_resolving_a_source_changes_nothing_in_it(changed: Changed, tmp_path: Path) -> None:
    source = changed(edit=bare)
    before = directory_bytes(source)
    resolve(str(source), revision=None, cache=tmp_path / "cache", progress=SilentProgress())
    CheckpointReader(source)
    assert directory_bytes(source) == before


# a tokenizer.model alone


@pytest.fixture
def sentencepiece_alone(tmp_path: Path) -> Path:
    """A source as older Llama checkpoints are: SentencePiece's file and a class, no tokenizer.json."""
    import sentencepiece

    directory, corpus = tmp_path / "source", tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"the river number {i} runs past the mill and the bridge" for i in range(200)))
    make_model(vocab_size=320).save_pretrained(directory)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(directory / "tokenizer"), vocab_size=300, model_type="bpe", pad_id=-1,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_tokenizer_model_alone_is_enough(sentencepiece_alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    _, notes = planned(sentencepiece_alone, tmp_path / "out", router="analytic")
    assert not any("tokenizer" in note for note in notes)


@pytest.mark.parametrize(
    ("installed", "hint"), [((), "pip install protobuf"), (("google.protobuf",), "pip install tiktoken")]
)
def test_the_package_that_a_tokenizer_model_takes_is_named(
    installed: tuple[str, ...],
    hint: str,
    sentencepiece_alone: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file")

    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", unreadable)
    monkeypatch.setattr(tokenizers, "_is_installed", lambda module: module in installed)
    with pytest.raises(UsageError, match="has no tokenizer that transformers can read") as caught:
        tokenizers.load_tokenizer(sentencepiece_alone, hint="otherwise")
    assert hint in str(caught.value.hint)
