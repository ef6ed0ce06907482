"""GGUF files as sources: every key, tensor and token arrives, or the file is refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import DenseSource
from gguf import GGUFWriter, RopeScalingType
from support.gguf_files import llama3_factors, write_model
from support.tiny import CASES, LETTERS, LLAMA3, SPECIAL, make_model, some_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from factorctl.checkpoint.gguf.rope import llama3_parameters
from factorctl.checkpoint.gguf.source import cached_copy
from factorctl.checkpoint.sources import Source, resolve
from factorctl.errors import FactorctlError, IntegrityError, UsageError
from factorctl.exporting.check.llama_cpp import has_llama_cpp
from factorctl.files.strict_json import read_json_object
from factorctl.models.loading import load_dense
from factorctl.pipeline.common import dense_source
from factorctl.progress import SilentProgress

Writer = Callable[..., Path]
needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="needs xllamacpp")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A byte-level tokenizer with merges, in the rows of a vocabulary of 40."""
    ids = {token: index for index, token in enumerate([*SPECIAL, *LETTERS, "Ġ", "Ċ", "ab", "abc"])}
    made = Tokenizer(models.BPE(ids, merges=[("a", "b"), ("ab", "c")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def written(tmp_path: Path, tokenizer: Path) -> Writer:
    def write(model: Any = None, **options: Any) -> Path:
        return write_model(tmp_path / "tiny.gguf", model or make_model(), tokenizer, **options)

    return write


def read(path: Path, check: Any = None) -> Source:
    cache = path.parent / "cache"
    return resolve(str(path), revision=None, cache=cache, progress=SilentProgress(), check_gguf=check)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(some_ids()).logits  # type: ignore[no-any-return]


# weights and hyperparameters

DIFFERENCES = {"gemma2": {"query_pre_attn_scalar": 8}, "gemma3_text": {"query_pre_attn_scalar": 8}}


@pytest.mark.parametrize("case", [case for case in CASES if case != "mistral"])
def test_every_family_is_read_as_it_was(case: str, written: Writer) -> None:
    model = make_model(case, **DIFFERENCES.get(case, {}))
    read_back = load_dense(read(written(model)).path)
    assert torch.equal(logits(read_back), logits(model))


def test_a_head_size_that_is_not_the_usual_one(written: Writer) -> None:
    model = make_model("qwen3", head_dim=16)
    read_back = load_dense(read(written(model)).path)
    assert read_back.config.head_dim == 16
    assert torch.equal(logits(read_back), logits(model))


ROPES = {
    "llama3": (LLAMA3, ()),
    "linear": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        (lambda w: w.add_rope_scaling_type(RopeScalingType.LINEAR), lambda w: w.add_rope_scaling_factor(4.0)),
    ),
    "a factor without a type": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        (lambda w: w.add_rope_scaling_factor(4.0),),
    ),
    "the key of old files": (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        (lambda w: w.add_float32("llama.rope.scale_linear", 2.0),),
    ),
    "yarn": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        (
            lambda w: w.add_rope_scaling_type(RopeScalingType.YARN),
            lambda w: w.add_rope_scaling_factor(4.0),
            lambda w: w.add_rope_scaling_orig_ctx_len(64),
        ),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_is_carried(name: str, written: Writer) -> None:
    rope, keys = ROPES[name]
    model = make_model(rope_parameters=dict(rope), head_dim=16)
    tensors = {"rope_freqs.weight": llama3_factors(LLAMA3, 16)} if name == "llama3" else {}
    source = read(written(model, keys=keys, tensors=tensors))
    carried = read_json_object(source.path / "config.json")["rope_parameters"]
    assert {key: carried[key] for key in rope} == rope
    assert torch.allclose(logits(load_dense(source.path)), logits(model), atol=1e-5)
    assert not torch.allclose(logits(make_model(head_dim=16)), logits(model), atol=1e-3), "or the test sees nothing"


@pytest.mark.parametrize(
    ("theta", "head_dim", "factor", "low", "high", "context"),
    [(500000.0, 128, 8.0, 1.0, 4.0, 8192), (500000.0, 64, 32.0, 1.0, 4.0, 8192), (1e4, 64, 4.0, 2.0, 8.0, 2048)],
)
def test_llama3_factors_are_recognised(
    theta: float, head_dim: int, factor: float, low: float, high: float, context: int
) -> None:
    rope = {"rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    found = llama3_parameters(
        llama3_factors({**rope, "original_max_position_embeddings": context}, head_dim).astype(np.float64), theta
    )
    assert found == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high / low,
        "original_max_position_embeddings": context / low,
    }


@pytest.mark.parametrize("factors", [[1.0, 2.0, 1.0, 8.0], [1.0, 1.5, 2.5, 6.0], [0.5, 1.0, 2.0, 4.0], [1.0]])
def test_other_factors_are_not_taken_for_llama3(factors: list[float]) -> None:
    assert llama3_parameters(np.array(factors), 10000.0) is None


def test_biases_that_some_projections_lack_are_zero(written: Writer) -> None:
    model = make_model("llama-biases")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    path = written(model, without=[f"blk.{layer}.attn_output.bias" for layer in range(2)])
    assert torch.equal(logits(load_dense(read(path).path)), logits(model))


def setting(key: str, value: Any) -> Callable[[GGUFWriter], Any]:
    """Add a key, or change one that is set."""

    def add(writer: GGUFWriter) -> None:
        types = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        kinds = {**types, str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}
        for values in writer.kv_data:
            values.pop(key, None)
        writer.add_key_value(key, value, kinds[type(value)])

    return add


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.rope.scaling.type", "longrope", r"llama\.rope\.scaling\.type = 'longrope'"),
        ("llama.rope.scaling.attn_factor", 1.19, r"llama\.rope\.scaling\.attn_factor = 1\.19"),
        ("llama.rope.dimension_count", 4, r"rotates 4 of the 8 .*llama\.rope\.dimension_count"),
        ("llama.attention.value_length", 4, r"llama\.attention\.value_length = 4"),
        ("llama.attention.sliding_window", 16, r"llama\.attention\.sliding_window = 16"),
        ("llama.attention.scale", 0.5, r"llama\.attention\.scale = 0\.5"),
        ("llama.attention.layer_norm_epsilon", 1e-5, r"llama\.attention\.layer_norm_epsilon"),
        ("llama.attn_logit_softcapping", 50.0, r"llama\.attn_logit_softcapping = 50\.0"),
        ("llama.final_logit_softcapping", 30.0, r"llama\.final_logit_softcapping = 30\.0"),
        ("llama.logit_scale", 0.25, r"llama\.logit_scale = 0\.25"),
        ("llama.embedding_scale", 12.0, r"llama\.embedding_scale = 12\.0"),
        ("llama.residual_scale", 0.22, r"llama\.residual_scale = 0\.2"),
        ("llama.attention.causal", False, r"llama\.attention\.causal = False"),
        ("llama.expert_count", 4, r"already is a mixture of experts \(llama\.expert_count = 4\)"),
        ("llama.attention.head_count_kv", [2, 1], r"llama\.attention\.head_count_kv differs from layer to layer"),
        ("llama.vocab_size", 41, r"llama\.vocab_size = 41"),
        ("llama.something.new", 3, r"sets llama\.something\.new = 3"),
        ("general.type", "adapter", r"general\.type is 'adapter'"),
        ("general.architecture", "mamba", r"architecture 'mamba'"),
        ("split.count", 2, r"part 1 of a model split over 2 files"),
        ("tokenizer.ggml.pre", "superbpe", r"tokenizer\.ggml\.pre = 'superbpe'"),
        ("tokenizer.ggml.model", "t5", r"tokenizer\.ggml\.model = 't5'"),
        ("tokenizer.ggml.eos_token_id", 40, r"tokenizer\.ggml\.eos_token_id = 40; the model has 40 tokens"),
    ],
)
def test_a_key_that_finds_no_place_is_named(key: str, value: Any, words: str, written: Writer) -> None:
    path = written(keys=[setting(key, value)])
    with pytest.raises(FactorctlError, match=words) as caught:
        read(path)
    assert "tiny.gguf" in caught.value.message
    assert caught.value.hint
    assert not list(path.parent.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.scale", 8**-0.5),
        ("llama.logit_scale", 1.0),
        ("llama.attention.causal", True),
        ("llama.expert_count", 0),
        ("llama.expert_used_count", 0),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.attention.sliding_window", 1024),
        ("llama.rope.scaling.type", "none"),
        ("llama.tensor_data_layout", "Meta AI original pth"),
        ("llama.vocab_size", 40),
        ("quantize.imatrix.file", "calibration.dat"),
        ("tokenizer.ggml.padding_token_id", 40),
    ],
)
def test_a_key_that_changes_nothing_is_let_through(key: str, value: Any, written: Writer) -> None:
    source = read(written(keys=[setting(key, value)]))
    assert torch.equal(logits(load_dense(source.path)), logits(make_model()))


@pytest.mark.parametrize("missing", ["llama.block_count", "llama.attention.layer_norm_rms_epsilon"])
def test_a_key_that_is_missing_is_named(missing: str, written: Writer) -> None:
    def drop(writer: GGUFWriter) -> None:
        for values in writer.kv_data:
            values.pop(missing, None)

    with pytest.raises(UsageError, match=f"lacks the key {missing}"):
        read(written(keys=[drop]))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("blk.0.attn_norm.bias", (32,), r"tensor blk\.0\.attn_norm\.bias, which transformers' llama has no place"),
        ("rope_factors_long.weight", (4,), r"tensor rope_factors_long\.weight"),
        ("blk.1.attn_q.scale", (1,), r"tensor blk\.1\.attn_q\.scale"),
        ("blk.2.ffn_up.weight", (48, 32), r"tensor blk\.2\.ffn_up\.weight"),
        ("cls.output.weight", (2, 32), r"tensor cls\.output\.weight"),
        ("rope_freqs.weight", (4,), r"factors in rope_freqs\.weight are not those of Llama 3"),
        ("blk.0.ffn_gate_exps.weight", (2, 48, 32), "already is a mixture of experts"),
    ],
)
def test_a_tensor_that_finds_no_place_is_named(name: str, shape: tuple[int, ...], words: str, written: Writer) -> None:
    values = np.linspace(3, 5, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    path = written(tensors={name: values})
    with pytest.raises(UsageError, match=words) as caught:
        read(path)
    assert "Hugging Face directory" in str(caught.value) or "dense model" in str(caught.value)
    assert not list(path.parent.rglob("*.safetensors"))


def test_a_tensor_of_another_shape_is_named(written: Writer) -> None:
    path = written(tensors={"blk.0.ffn_up.weight": np.zeros((40, 32), dtype=np.float32)})
    with pytest.raises(IntegrityError, match=r"blk\.0\.ffn_up\.weight has shape \(40, 32\); its keys say \(48, 32\)"):
        read(path)


# tokens


def test_no_token_is_added_that_the_file_does_not_have(written: Writer, tokenizer: Path) -> None:
    read_back = AutoTokenizer.from_pretrained(read(written(pre="llama-bpe")).path)
    ours = AutoTokenizer.from_pretrained(tokenizer)
    assert read_back.get_vocab() == ours.get_vocab()
    assert read_back.unk_token is None
    assert (read_back.bos_token, read_back.eos_token) == ("<s>", "</s>")
    assert read_back("cabc").input_ids == [1, *ours("cabc").input_ids]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_file_splits_text_as_its_export_says(pre: str, written: Writer) -> None:
    from factorctl.exporting.gguf.tokenizer import pre_tokenizer

    directory = read(written(pre=pre)).path
    assert pre_tokenizer(json.loads((directory / "tokenizer.json").read_text())) == pre


def test_chat_template_and_ends_of_turns_arrive(written: Writer) -> None:
    keys = [
        lambda w: w.add_chat_template([{"name": "default", "template": "A{{ x }}"}, {"name": "tool", "template": "B"}]),
        lambda w: w.add_eot_token_id(3),
        lambda w: w.add_pad_token_id(0),
    ]
    directory = read(written(keys=keys)).path
    assert AutoTokenizer.from_pretrained(directory).chat_template == {"default": "A{{ x }}", "tool": "B"}
    generation = read_json_object(directory / "generation_config.json")
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([2, 3], 0)


def test_sentencepiece_pieces_are_joined_by_score(tmp_path: Path, tokenizer: Path) -> None:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        "▁",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "▁ab",
    ]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 7]
    scores = [0.0] * 259 + [-4.0, -5.0, -6.0, -7.0, -2.0, -1.0, -3.0]

    def sentencepiece(writer: GGUFWriter) -> None:
        for key, value in (("model", "llama"), ("tokens", pieces), ("token_type", kinds), ("scores", scores)):
            setting(f"tokenizer.ggml.{key}", value)(writer)
        for values in writer.kv_data:
            values.pop("tokenizer.ggml.merges", None)

    model = make_model(vocab_size=len(pieces))
    path = write_model(tmp_path / "tiny.gguf", model, tokenizer, keys=[sentencepiece])
    read_back = AutoTokenizer.from_pretrained(read(path).path)
    assert read_back.convert_ids_to_tokens(read_back("abc ab é").input_ids) == [
        "<s>", "▁", "a", "bc", "▁ab", "▁", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    assert read_back.decode(read_back("abc ab é").input_ids, skip_special_tokens=True) == "abc ab é"


# the second opinion


@needs_llama_cpp
def test_a_file_is_compared_with_llama_cpp_before_it_is_kept(written: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_source, "LENGTH", 6)
    path = written(make_model(vocab_size=40, hidden_size=32))
    source = read(path, dense_source.compare_with_llama_cpp)
    assert "compared with llama.cpp (xllamacpp" in source.notes[-1]
    shutil.rmtree(path.parent / "cache")
    genuine = dense_source.read_dense_model

    def otherwise(directory: Path) -> Any:
        dense = genuine(directory)
        dense.config.rope_parameters["rope_theta"] = 10.0
        return dense

    monkeypatch.setattr(dense_source, "read_dense_model", otherwise)
    with pytest.raises(IntegrityError, match=r"tiny\.gguf: what was read does not compute what llama\.cpp"):
        read(path, dense_source.compare_with_llama_cpp)
    assert not list(path.parent.rglob("*.safetensors"))


def test_tokens_that_llama_cpp_sees_otherwise_are_refused(written: Writer) -> None:
    path, ours = written(), [[1, 2, 3]] * len(dense_source.PASSAGES)
    assert dense_source._compare_tokens(path, ours, ours) == ""
    with pytest.raises(IntegrityError, match=r"llama\.cpp tokenises 'Alice"):
        dense_source._compare_tokens(path, ours, [[1, 2, 4], *ours[1:]])


def test_without_llama_cpp_a_note_says_so(written: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_source, "has_llama_cpp", lambda: False)
    source = read(written(), dense_source.compare_with_llama_cpp)
    assert source.notes[-1] == (
        "tiny.gguf was not compared with llama.cpp, which is not at hand (pip install xllamacpp)"
    )


# what a file is


def test_a_gguf_file_is_known_by_its_first_bytes(written: Writer, dense_source: DenseSource, tmp_path: Path) -> None:
    plain = Path(shutil.copy(written(), tmp_path / "model"))
    assert read(plain).kind == "gguf"
    impostor = Path(shutil.copy(dense_source() / "model.safetensors", tmp_path / "other.gguf"))
    with pytest.raises(UsageError, match=r"other\.gguf is a safetensors file") as caught:
        read(impostor)
    assert str(tmp_path) in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "words", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a git-lfs pointer", "git lfs pull"),
        (b"", "an empty file", "fetch the file again"),
        (b"PK\x03\x04rest", "a zip archive", "save_pretrained"),
        (b"\x80\x02}q\x00", "a Python pickle", "save_pretrained"),
        (b"<!DOCTYPE html><html>", "a web page", "fetch the file again"),
        (b"GGML old", "no GGUF file", "fetch the file again"),
    ],
)
def test_another_file_by_that_name(content: bytes, words: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"model\.gguf is {words}") as caught:
        read(path)
    assert hint in str(caught.value.hint)


def test_a_directory_with_nothing_but_a_gguf_file(written: Writer) -> None:
    path = written()
    folder = path.parent / "folder"
    folder.mkdir()
    shutil.move(path, folder / "tiny.gguf")
    with pytest.raises(UsageError, match=r"holds no config\.json") as caught:
        read(folder)
    assert caught.value.hint == f"give the file itself: {folder / 'tiny.gguf'}"


def test_what_an_older_reading_left_in_the_cache_is_not_taken(written: Writer) -> None:
    path = written()
    source = read(path)
    assert source.revision is not None
    assert source.path == cached_copy(source.revision, path.parent / "cache")
    assert source.path.name != source.revision[:16]
