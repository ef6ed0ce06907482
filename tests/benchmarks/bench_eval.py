"""What routing cost the demo model, beside every control: five tasks, held-out text, layer fidelity.

    python tests/benchmarks/bench_eval.py WORK --data valid.jsonl.xz --task-data bench --calibration train.jsonl.xz

WORK holds the checkpoints; those that are missing are factorized there first: 1R4E2K, and 8 experts with a quarter of
the neurons shared and the refit. Each is evaluated with all controls. An interrupted run goes on where it stopped.
The report is written to docs/benchmarks/<date>-eval-demo-<cpu>.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from reporting import header, report_path, write_report

LIBRARIES = ("factorctl", "torch", "transformers", "lm-eval", "numpy")
TASKS = "piqa,openbookqa,arc_easy,winogrande,boolq"
CASES = {
    "demo-1R4E2K": ["--experts", "4", "--top-k", "2", "--strategy", "clustered"],
    "demo-8-experts-shared-refit": [
        "--experts", "8", "--top-k", "4", "--strategy", "clustered", "--shared-fraction", "0.25", "--refit",
    ],
}  # fmt: skip


def run(*arguments: str) -> None:
    print("factorctl", *arguments, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "factorctl", *arguments], check=True, stdout=subprocess.DEVNULL)


def without_places(text: str, args: argparse.Namespace) -> str:
    """The report with the names of files and directories, not where they lie on this machine."""
    for path in (args.data, args.task_data, args.calibration):
        text = text.replace(path, Path(path).name)
    return text.replace(str(args.work), "runs")


def share_dense_parts(first: Path, other: Path) -> None:
    """The dense model is the same for both: what was measured of it once need not be measured again."""
    (other / "parts").mkdir(parents=True, exist_ok=True)
    for part in (first / "parts").glob("dense-*"):
        if not (other / "parts" / part.name).exists():
            shutil.copy(part, other / "parts" / part.name)


def section(name: str, options: list[str], args: argparse.Namespace) -> str:
    """Factorize if that was not done, evaluate, and return the report with its headings one level lower."""
    checkpoint = args.work / name
    calibration = ["--calibration", args.calibration, "--calibration-tokens", args.calibration_tokens]
    if not (checkpoint / "factorctl.json").is_file():
        run("factorize", "demo", *options, *calibration, "--out", str(checkpoint))
    report = args.work / f"{name}.md"
    share_dense_parts(args.work / f"{next(iter(CASES))}-eval", args.work / f"{name}-eval")
    run(
        "eval", str(checkpoint), "--tasks", TASKS, "--task-data", args.task_data, "--limit", str(args.limit),
        "--data", args.data, "--data-tokens", args.data_tokens, "--document-tokens", "512",
        "--controls-all", *calibration, "--resume", "--dtype", args.dtype,
        "--out", str(args.work / f"{name}-eval"), "--report", str(report),
    )  # fmt: skip
    lines = report.read_text(encoding="utf-8").splitlines()
    lowered = [f"#{line}" if line.startswith("#") else line for line in lines]
    return "\n".join([f"## {name}", "", f"`factorctl factorize demo {' '.join(options)}`", "", *lowered[2:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", required=True, help="held-out text")
    parser.add_argument("--task-data", required=True, help="directory with the five tasks")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--calibration-tokens", default="16K")
    parser.add_argument("--data-tokens", default="20K")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--dtype", default="float32", help="compute dtype of every model")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    sections = [section(name, options, args) for name, options in CASES.items()]
    text = [
        header("Evaluating the demo model", libraries=LIBRARIES).strip(),
        f"SmolLM2-135M-Instruct from its Q4_1 GGUF, computed in {args.dtype}, calibrated in float32 on "
        f"{args.calibration_tokens} tokens; {args.limit} documents of each task, {args.data_tokens} tokens of held-out "
        "text. No gradient was taken.",
        *sections,
    ]
    write_report(report_path("eval-demo"), without_places("\n\n".join(text) + "\n", args))


if __name__ == "__main__":
    main()
