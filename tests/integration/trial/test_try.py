"""`factorctl try` on tiny models: what it prints, and that it is what the two models really write."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import DenseSource
from support.command_line import Outcome, cli
from support.exporting import export_unchecked, make_gguf_source, make_native
from support.tiny import factorize_quietly, weights_only
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from factorctl import load
from factorctl.config.export import ExportConfig
from factorctl.errors import ExitCode
from factorctl.exporting.gguf.writer import GgufWriter
from factorctl.exporting.jobs import Verified
from factorctl.models.assembling import dense_twin
from factorctl.models.loading import load_dense
from factorctl.pipeline.export.run import export
from factorctl.progress import SilentProgress

NEW = 12
COMMON = ("--device", "cpu", "--max-new-tokens", NEW)


def tried(*arguments: object) -> dict[str, Any]:
    outcome = cli("try", *arguments, *COMMON, "--format", "json", "--quiet")
    assert outcome.code == ExitCode.DONE, outcome.stderr
    return outcome.json


def typed(text: str, *arguments: object) -> Outcome:
    with mock.patch.object(sys, "stdin", io.StringIO(text)):
        return cli("try", *arguments, *COMMON)


@torch.no_grad()
def likeliest(model: PreTrainedModel, ids: list[int]) -> int:
    """The dumb way: the whole text anew for every token."""
    return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < NEW and (not tokens or tokens[-1] != 2):
        tokens.append(likeliest(model, [*prompt, *tokens]))
    return tokens


# native checkpoints


def test_both_write_what_they_write_alone_and_are_compared_place_by_place(
    refitted: Path, dense_source: DenseSource
) -> None:
    result = tried(refitted, "some words", "--raw")
    (answer,) = result["answers"]
    dense, model = load_dense(dense_source()), load(refitted)
    tokenizer = AutoTokenizer.from_pretrained(dense_source())
    prompt = tokenizer("some words")["input_ids"]
    written = greedy(dense, prompt)
    assert answer["prompt_tokens"] == len(prompt)
    assert answer["dense"]["tokens"] == written
    assert answer["model"]["tokens"] == greedy(model, prompt)
    assert answer["dense"]["text"] == tokenizer.decode(written, skip_special_tokens=True)
    alike = sum(likeliest(model, [*prompt, *written[:place]]) == token for place, token in enumerate(written))
    assert answer["alike"] == alike < len(written)
    assert answer["alike_share"] == alike / len(written) == result["alike_share"]
    pairs = zip(written, answer["model"]["tokens"], strict=False)
    first = next(place for place, (theirs, ours) in enumerate(pairs) if theirs != ours)
    assert answer["first_difference"]["token"] == first + 1
    assert answer["first_difference"]["dense"] == tokenizer.decode([written[first]])
    assert result["same_runtime"] is True
    assert result["runtime"]["dense"] == result["runtime"]["model"]
    assert result["speed_up"] == result["model_tokens_per_second"] / result["dense_tokens_per_second"]
    assert (result["chat"], result["temperature"]) == (False, 0)


def test_with_every_expert_on_nothing_differs(dense_source: DenseSource, tmp_path: Path) -> None:
    factorize_quietly(weights_only(dense_source(), tmp_path / "whole", top_k=4))
    outcome = cli("try", tmp_path / "whole", "some words", *COMMON)
    assert outcome.code == ExitCode.DONE, outcome.stderr
    assert "no token differs" in outcome.stdout
    assert "(100%)" in outcome.stdout


@pytest.mark.parametrize("case", ["llama", "llama-biases", "llama-tied", "phi3", "gemma3_text"])
def test_the_dense_twin_is_the_dense_model(case: str, dense_source: DenseSource) -> None:
    source, device = dense_source(case), torch.device("cpu")
    ids = torch.randint(4, 30, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        twin = dense_twin(source, dtype=torch.float64, device=device)(ids).logits
        dense = load_dense(source, dtype=torch.float64)(ids).logits
    assert torch.allclose(twin, dense, atol=1e-6)


def test_the_text_says_who_wrote_what_how_fast_and_where_they_part(refitted: Path) -> None:
    outcome = cli("try", refitted, "some words", *COMMON)
    assert outcome.code == ExitCode.DONE, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0] == "> some words"
    assert lines.index("llama, dense:") < lines.index("refitted, 1R4E2K+S12:")
    assert sum("tokens/s, first after" in line for line in lines) == 2
    for words in (
        "first token that differs: ",
        "chosen alike: ",
        "both run by transformers",
        "the dense model's tokens/s",
    ):
        assert words in outcome.stdout
    assert "no chat template" in outcome.message


def test_sampling_draws_the_same_for_the_same_seed_and_needs_one_to_be_asked_for(checkpoint: Path) -> None:
    def tokens(*options: object) -> tuple[list[int], list[int]]:
        (answer,) = tried(checkpoint, "some words", *options)["answers"]
        return answer["dense"]["tokens"], answer["model"]["tokens"]

    assert tokens("--temperature", 5, "--seed", 1) == tokens("--temperature", 5, "--seed", 1)
    assert tokens("--temperature", 5, "--seed", 1) != tokens("--temperature", 5, "--seed", 2)
    assert tokens("--top-p", 1e-9) == tokens(), "the likeliest token alone"


def test_prompts_from_a_file_end_in_a_table(refitted: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("some words\n\nand others\n")
    outcome = cli("try", refitted, "--prompts", tmp_path / "p.txt", *COMMON)
    assert outcome.code == ExitCode.DONE, outcome.stderr
    assert [line for line in outcome.stdout.splitlines() if line.startswith("> ")] == ["> some words", "> and others"]
    assert "All prompts" in outcome.stdout


def test_without_a_prompt_lines_are_read_until_the_end(refitted: Path) -> None:
    outcome = typed("some words\n\nand others\n", refitted, "--format", "json", "--quiet")
    assert [answer["prompt"] for answer in outcome.json["answers"]] == ["some words", "and others"]
    nothing = typed("", refitted, "--format", "json", "--quiet").json
    assert (nothing["answers"], nothing["alike_share"], nothing["speed_up"]) == ([], None, None)
    assert "no prompt was given" in typed("", refitted, "--quiet").stdout


def test_a_lone_argument_with_a_space_is_the_prompt_for_the_newest(
    dense_source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    factorize_quietly(weights_only(dense_source(), tmp_path / "runs" / "mine", top_k=1))
    outcome = cli("try", "some words", *COMMON)
    assert outcome.code == ExitCode.DONE, outcome.stderr
    assert "taking the newest, runs/mine" in outcome.message
    assert outcome.stdout.startswith("> some words\n")


def test_the_chat_template_makes_a_message_of_the_prompt(dense_source: DenseSource, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense_source(), tmp_path / "chatty"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    factorize_quietly(weights_only(source, tmp_path / "made", top_k=2))
    chat, raw = tried(tmp_path / "made", "abc"), tried(tmp_path / "made", "abc", "--raw")
    assert (chat["chat"], chat["answers"][0]["prompt_tokens"]) == (True, 6)
    assert (raw["chat"], raw["answers"][0]["prompt_tokens"]) == (False, 3)


def test_a_report_is_written_where_one_is_asked_for(refitted: Path, tmp_path: Path) -> None:
    report = tmp_path / "reports" / "try.json"
    outcome = cli("try", refitted, "some words", "--out", report, *COMMON)
    assert (outcome.code, f"written: {report}" in outcome.stdout) == (ExitCode.DONE, True)
    written = json.loads(report.read_text())
    assert written["answers"][0]["prompt"] == "some words"
    assert written["config"]["raw"] is True
    directory = cli("try", refitted, "some words", "--out", tmp_path, *COMMON)
    assert (directory.code, "is a directory" in directory.message) == (ExitCode.USAGE, True)


def test_a_dry_run_loads_nothing(refitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorctl.pipeline.trial.run.engines", None)
    plan = cli("try", refitted, "some words", *COMMON, "--dry-run", "--format", "json").json
    assert plan["prompts"] == [{"prompt": "some words", "tokens": 10}]
    assert plan["runtime"] == {"dense": "factorctl", "model": "factorctl"}
    assert plan["memory_bytes"] > 700_000_000
    assert "read from stdin" in cli("try", refitted, "--dry-run", *COMMON).stdout


# what is refused


def test_what_cannot_be_tried_says_what_to_do(refitted: Path, tmp_path: Path) -> None:
    missing = cli("try", tmp_path / "nowhere", "some words")
    assert missing.code == ExitCode.USAGE
    assert "nowhere" in missing.message
    swapped = cli("try", "some words", refitted)
    assert (swapped.code, "hint: name the checkpoint first" in swapped.message) == (ExitCode.USAGE, True)
    word = cli("try", "Hello")
    assert "no model 'Hello': no such path, alias or hub id" in word.message
    assert "factorctl try CKPT Hello" in word.message
    none = cli("try", "--workspace", tmp_path)
    assert "holds none" in none.message
    assert "factorctl factorize demo --experts 4" in none.message
    long = cli("try", refitted, "a" * 1020, *COMMON)
    assert (long.code, "--max-new-tokens 4 or fewer" in long.message) == (ExitCode.USAGE, True)
    (tmp_path / "empty.txt").write_text("\n")
    empty = cli("try", refitted, "--prompts", tmp_path / "empty.txt")
    assert (empty.code, "holds no prompt" in empty.message) == (ExitCode.USAGE, True)
    chat = cli("try", refitted, "some words", "--chat")
    assert (chat.code, "has no chat template" in chat.message) == (ExitCode.USAGE, True)


def test_a_line_that_does_not_fit_ends_a_pipe_and_not_a_conversation(
    refitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a" * 1020 + "\nsome words\n"
    piped = typed(text, refitted)
    assert (piped.code, "--max-new-tokens 4 or fewer" in piped.message) == (ExitCode.USAGE, True)
    lines = iter(text.splitlines())
    monkeypatch.setattr("factorctl.cli.render.ask", lambda question: next(lines, None))
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with mock.patch.object(sys, "stdin", terminal):
        outcome = cli("try", refitted, *COMMON)
    assert (outcome.code, "--max-new-tokens 4 or fewer" in outcome.message) == (ExitCode.DONE, True)
    assert "> some words" in outcome.stdout


# exports


def test_an_export_and_its_dense_model_are_run_by_transformers_alone(
    checkpoint: Path, dense_source: DenseSource, tmp_path: Path
) -> None:
    export_unchecked(ExportConfig(checkpoint=checkpoint, target="hf", out=tmp_path / "hf", device="cpu"))
    result = tried(tmp_path / "hf", "some words")
    assert result["runtime"]["model"].startswith("transformers ")
    assert result["runtime"]["dense"] == result["runtime"]["model"]
    assert "factorctl" not in result["runtime"]["model"]
    (answer,) = result["answers"]
    prompt = AutoTokenizer.from_pretrained(dense_source())("some words")["input_ids"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert answer["model"]["tokens"] == greedy(stock, prompt)
    (native,) = tried(checkpoint, "some words")["answers"]
    assert (answer["model"]["tokens"], answer["alike"]) == (native["model"]["tokens"], native["alike"])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A GGUF export, beside the native checkpoint and the dense source that it was made from."""
    pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp, which is not installed")
    root = tmp_path_factory.mktemp("gguf")
    source = make_gguf_source(root / "dense", "llama")
    native = make_native(root, "llama", text_file, source=source)
    native.rename(root / "native")
    with mock.patch.object(GgufWriter, "verify", return_value=Verified("nothing", None)):
        export(ExportConfig(checkpoint=root / "native", target="gguf", out=root / "gguf"), SilentProgress())
    return root


def test_a_gguf_is_run_by_llama_cpp_and_writes_what_the_native_checkpoint_writes(gguf: Path) -> None:
    result = tried(gguf / "gguf", "The weather")
    assert result["runtime"]["model"].startswith("llama.cpp")
    assert (result["same_runtime"], result["speed_up"]) == (False, None)
    assert "different engines" in " ".join(result["remarks"])
    (answer,), (native,) = result["answers"], tried(gguf / "native", "The weather")["answers"]
    assert answer["dense"]["tokens"] == native["dense"]["tokens"]
    assert answer["model"]["tokens"] == native["model"]["tokens"]
    assert answer["alike"] == native["alike"] < NEW
    assert answer["model_tokens_per_second"] > 0


def test_a_bare_gguf_needs_its_dense_model_named(gguf: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copy(gguf / "gguf" / "model.gguf", tmp_path / "bare.gguf"))
    unknown = cli("try", bare, "The weather", *COMMON)
    assert (unknown.code, "--against MODEL" in unknown.message) == (ExitCode.USAGE, True)
    plan = cli("try", bare, "The weather", "--against", gguf / "dense", "--dry-run", "--format", "json").json
    assert plan["runtime"] == {"dense": "transformers", "model": "llama.cpp"}


def test_a_gguf_of_another_model_is_refused(gguf: Path, dense_source: DenseSource) -> None:
    outcome = cli("try", gguf / "gguf", "The weather", "--against", dense_source("llama"), *COMMON)
    assert outcome.code == ExitCode.USAGE
    assert "is a file of another model than" in outcome.message
    assert "--against MODEL" in outcome.message


def test_a_gguf_is_run_on_the_cpu_alone(gguf: Path) -> None:
    outcome = cli("try", gguf / "gguf", "The weather", "--device", "cuda")
    assert (outcome.code, "on the CPU alone" in outcome.message) == (ExitCode.USAGE, True)


def test_a_damaged_gguf_is_not_run(gguf: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(gguf / "gguf", tmp_path / "damaged"))
    content = bytearray((damaged / "model.gguf").read_bytes())
    content[-1] ^= 1
    (damaged / "model.gguf").write_bytes(content)
    outcome = cli("try", damaged, "The weather", *COMMON)
    assert (outcome.code, "its manifest says" in outcome.message) == (ExitCode.INTEGRITY, True)
