"""Rows for the eight tasks, made on the fly, a tiny model that reads their prompts, and lm-eval's own command line."""

from __future__ import annotations

import functools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.tasks
import pytest
import yaml
from lm_eval._cli.harness import HarnessCLI
from support.tiny import SPECIAL, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from factorctl.evaluation.tasks import PAPER_TASKS

SUBJECTS = ("anatomy", "virology")
DEFINITIONS = {"arc_easy": "arc", "arc_challenge": "arc", "boolq": "super_glue/boolq", "mmlu": "mmlu/default"}
FILES = {"boolq": "default", "winogrande": "default", "mmlu": "_default_template_yaml"}


def make_reader(directory: Path, **changes: Any) -> Path:
    """A tiny model with a tokenizer of single bytes, so that no character of a prompt is lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    make_model("llama", **{"vocab_size": len(ids), **changes}).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def words(draw: random.Random, least: int = 1, most: int = 4) -> str:
    return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(draw.randint(least, most)))


def make_row(task: str, number: int, draw: random.Random) -> dict[str, Any]:
    """One row in the Hub's field names, with fields that no prompt needs."""
    if task == "hellaswag":
        return {
            "ind": number,
            "activity_label": words(draw),
            "ctx_a": f"{words(draw)} [header] {words(draw)}.",
            "ctx_b": words(draw),
            "ctx": "",
            "endings": [f"{words(draw)} [title] {words(draw)}." for _ in range(4)],
            "split": "val",
            "label": str(draw.randrange(4)),
        }
    if task in ("openbookqa", "arc_easy", "arc_challenge"):
        labels = list("ABCDE"[: 4 if task == "openbookqa" else 3 + number % 3])
        question = "question_stem" if task == "openbookqa" else "question"
        choices = {"text": [words(draw) for _ in labels], "label": labels}
        return {"id": f"q{number}", question: words(draw), "choices": choices, "answerKey": draw.choice(labels)}
    if task == "winogrande":
        sentence = f"{words(draw)} _ {words(draw)}."
        return {"sentence": sentence, "option1": words(draw), "option2": words(draw), "answer": draw.choice("12")}
    if task == "boolq":
        label = int(number % 3 > 0)
        return {"question": words(draw), "passage": words(draw, 5, 9), "idx": number, "label": label}
    if task == "piqa":
        return {"goal": words(draw), "sol1": words(draw), "sol2": words(draw), "label": draw.randrange(2)}
    choices = [words(draw) for _ in range(4)]
    return {
        "question": words(draw),
        "subject": SUBJECTS[number % 3 == 0],
        "choices": choices,
        "answer": draw.randrange(4),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_task_data(directory: Path, *, rows: int = 8, tasks: tuple[str, ...] = PAPER_TASKS, seed: int = 0) -> Path:
    """DIR with a file and a few-shot file for each of `tasks`."""
    directory.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        draw = random.Random(f"{task}{seed}")
        write_rows(directory / f"{task}.jsonl", [make_row(task, number, draw) for number in range(rows)])
        examples = "mmlu_dev" if task == "mmlu" else f"{task}_train"
        write_rows(directory / f"{examples}.jsonl", [make_row(task, number, draw) for number in range(6)])
    return directory


def write_definition(directory: Path, task: str, data: Path, subject: str = "") -> str:
    """The YAML file with which lm-eval itself reads `data`: its own definition included, the data set exchanged."""
    assert lm_eval.tasks.__file__ is not None
    folder, file = DEFINITIONS.get(task, task), FILES.get(task, task)
    config: dict[str, Any] = {
        "include": str(Path(lm_eval.tasks.__file__).parent / folder / (file if subject else f"{file}.yaml")),
        "task": f"own_{subject or task}",
        "dataset_path": "json",
        "dataset_name": None,
    }
    files = {"validation": data / f"{task}.jsonl", "train": data / f"{task}_train.jsonl"}
    if task in ("arc_easy", "arc_challenge", "openbookqa"):
        files = {"test": files["validation"], "train": files["train"]}
        config["validation_split"] = None
    if subject:
        files = {"test": _of_subject(data, "mmlu", subject), "dev": _of_subject(data, "mmlu_dev", subject)}
        topic = subject.replace("_", " ")
        config["description"] = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    if not (present := {split: str(path) for split, path in files.items() if path.is_file()}).get("train"):
        config["training_split"] = None
    config["dataset_kwargs"] = {"data_files": present, "cache_dir": str(directory / "cache")}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    return str(config["task"])


def _of_subject(data: Path, stem: str, subject: str) -> Path:
    rows = [json.loads(line) for line in (data / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()]
    return write_rows(data / f"{stem}_{subject}.jsonl", [row for row in rows if row["subject"] == subject])


def write_group(directory: Path, name: str, tasks: list[str]) -> str:
    """A group that is scored as MMLU is: the mean over subjects, weighted by their size."""
    config = {"group": name, "task": tasks, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return name


@dataclass(frozen=True)
class CommandLineRun:
    """What `lm_eval run` wrote: scores by task and metric, and the samples of each task in their order."""

    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


def lm_eval_command_line(
    monkeypatch: pytest.MonkeyPatch, definitions: Path, out: Path, *arguments: object
) -> CommandLineRun:
    """`lm_eval run ... --log_samples` in this process."""
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)  # indexing 14,000 files takes 12 s and more
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which it sets itself, and would leave behind
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)  # asks pip
    places = ["--include_path", definitions, "--output_path", out, "--log_samples", "--device", "cpu"]
    command = ["lm_eval", "run", "--model", "hf", *arguments, *places]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    harness = HarnessCLI()
    harness.execute(harness.parse_args())
    (results,) = out.rglob("results_*.json")
    samples = {}
    for path in sorted(out.rglob("samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[task] = sorted(lines, key=lambda line: int(line["doc_id"]))
    return CommandLineRun(json.loads(results.read_text(encoding="utf-8"))["results"], samples)
