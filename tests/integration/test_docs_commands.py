"""Every command in the README and the docs is run here, on a tiny model and a little text, or says what it needs.

A line that begins with a program in a code block is a command. `# needs ...` behind it says why it is not run here: a
Hub, a GPU, an engine. The names in the docs (demo, corpus.jsonl.zst, runs/demo-1R4E2K) stand for tiny ones in the
working directory of the test, and sizes are made small; nothing else is changed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import cli
from support.exporting import make_gguf_source
from support.tasks import make_task_data
from support.tiny import calibrated, factorize_quietly, weights_only

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "cli.md")]
PROGRAMS = ("factorctl", "accelerate", "torchrun", "vllm", "llama-cli", "llama-server", "llama-quantize", "ollama")
COMMAND = re.compile(rf"^\s*(?:\$ )?((?:{'|'.join(PROGRAMS)}|python -m \S+) .*)$")
SMALL = {"40M": "1K", "60K": "1K", "16K": "1K", "64K": "1K"}
SHORTENED = {
    "factorize": ["--calibration-tokens", "1K"],
    "finetune": ["--block-length", "32", "--batch-tokens", "128", "--heldout-tokens", "256", "--max-epochs", "50"],
    "eval": ["--data-tokens", "1K", "--calibration-tokens", "1K", "--limit", "2"],
    "frontier": [
        *("--experts", "2", "--calibration", "notes.jsonl", "--calibration-tokens", "512", "--data-tokens", "256"),
        *("--prompt", "16", "--rounds", "1"),
    ],
    "profile": ["--rounds", "1", "--decode-tokens", "1", "--seconds", "1"],
    "try": ["--max-new-tokens", "4"],
}


def commands() -> Iterator[tuple[str, str]]:
    """(page, command), in the order of the page; wrapped lines are joined."""
    for page in PAGES:
        for block in code_blocks(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                match = COMMAND.match(line)
                if match:
                    yield page.name, match[1]


def code_blocks(text: str) -> Iterator[str]:
    """Fenced blocks of shell or no language, and indented ones."""
    parts = re.split(r"^```(\w*).*$", text, flags=re.MULTILINE)
    for language, content in zip(parts[1::4], parts[2::4], strict=False):
        if language in ("", "sh", "console", "text"):
            yield content
    for prose in parts[0::4]:
        for indented, lines in itertools.groupby(prose.splitlines(), key=lambda line: line.startswith("    ")):
            if indented:
                yield "\n".join(lines)


RUNNABLE = [(page, command) for page, command in commands() if "# needs" not in command]


def test_the_docs_have_commands() -> None:
    assert len(RUNNABLE) > 20
    assert {"README.md", "eval.md", "finetune.md", "profile.md", "recipes.md", "serve.md"} <= {p for p, _ in RUNNABLE}


@pytest.fixture(scope="module")
def place(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the names of the docs exist."""
    root = tmp_path_factory.mktemp("docs")
    dense = make_gguf_source(tmp_path_factory.mktemp("dense") / "llama", "llama")
    for name in ("demo", "meta/TinyLlama", "MODEL"):
        shutil.copytree(dense, root / name)
    parts, domains = text_file.read_text().split("\n\n"), itertools.cycle(("wiki", "code", "books", "textbook"))
    lines = [json.dumps({"text": part, "domain": domain}) for part, domain in zip(parts, domains, strict=False)]
    for name in ("notes.jsonl", "held-out.jsonl", "corpus.jsonl", "DATA.jsonl"):
        (root / name).write_text("\n".join(lines))
    (root / "questions.txt").write_text("Why?\nHow so?\n")
    pruned = calibrated(root / "demo", root / "runs" / "pruned-K0", text_file, top_k=0, shared_fraction=0.5)
    factorize_quietly(pruned)
    # Last, so that it is the newest, which commands without a checkpoint take.
    factorize_quietly(weights_only(root / "demo", root / "runs" / "demo-1R4E2K", top_k=2))
    make_task_data(root / "bench")
    for name in ("demo-1R4E2K", "pruned-K0"):  # a page may compare two reports
        data = ["--data", root / "notes.jsonl", "--data-tokens", "256", "--workspace", root / "runs", "--quiet"]
        assert cli("eval", root / "runs" / name, *data).code == 0
    recipe = (ROOT / "docs" / "recipes.md").read_text().split("```toml\n")[1].split("```")[0]
    (root / "recipe.toml").write_text(shortened_recipe(recipe))
    return root


def shortened_recipe(text: str) -> str:
    for large, small in {
        '"16K"': '"1K"',
        '"60K"': '"1K"',
        "512]": "64]",
        "block-length = 512": "block-length = 32",
    }.items():
        text = text.replace(large, small)
    return text.replace("[finetune]", "[finetune]\nheldout-tokens = 256\nmax-epochs = 50")


def arguments_of(command: str, root: Path) -> list[str]:
    words = shlex.split(command, comments=True)[1:]
    words = [SMALL.get(word, word) for word in words]
    words = ["DATA.jsonl" if word == "DATA" else word.removesuffix(".zst") for word in words]
    verb = words[0]
    if verb == "finetune" and "--data" not in words:
        words += ["--data", "corpus.jsonl"]
    extra = SHORTENED.get(verb, [])
    options = [pair for pair in zip(extra[::2], extra[1::2], strict=True) if pair[0] not in words]
    if verb in ("factorize", "finetune", "export") and "--out" not in words:
        options.append(("--overwrite", ""))
    return [*words, *(word for pair in options for word in pair if word)]


@pytest.mark.parametrize(("page", "command"), RUNNABLE, ids=[f"{page}: {command}" for page, command in RUNNABLE])
def test_the_command_does_what_it_is_shown_for(
    page: str, command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert command.startswith("factorctl "), f"{page}: mark it with `# needs ...`: {command}"
    outcome = cli(*arguments_of(command, place))
    assert outcome.code == 0, f"{page}: {command}\n{outcome.stderr}"
    assert os.listdir(place), "nothing was deleted"
