"""What tests share: a cache of their own, and tiny models and texts that are made once per process."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests of interrupts would wait."""

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Before torch starts threads: several workers share the cores, and a forked child must not wait for lost threads."""

from factorctl.ffn.kernel.cpu import is_available  # noqa: E402  # after the number of threads is set

KERNELS = Path(tempfile.gettempdir(), f"factorctl-tests-{os.getuid()}", "kernels")
KERNELS.mkdir(parents=True, exist_ok=True)
with pytest.MonkeyPatch.context() as first:
    first.setenv("FACTORCTL_CACHE", str(KERNELS.parent))
    first.delenv("FACTORCTL_KERNEL", raising=False)
    is_available()  # before any test asks: none pays for it, none that breaks files or clocks breaks it

pytest_plugins = ("faults.tally",)
DenseSource = Callable[..., Path]


def make_cache(directory: Path) -> str:
    """An empty cache, but for the compiled kernel: it takes seconds to make and is the same for every test."""
    (directory / "kernels").symlink_to(KERNELS)
    return str(directory)


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that outlive a test stay out of the user's cache too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACTORCTL_CACHE", make_cache(tmp_path_factory.mktemp("cache")))
        patch.delenv("FACTORCTL_DEBUG", raising=False)
        patch.delenv("FACTORCTL_KERNEL", raising=False)
        patch.delenv("FACTORCTL_LOAD_PLUGINS", raising=False)
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what another one cached."""
    monkeypatch.setenv("FACTORCTL_CACHE", make_cache(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def dense_source(tmp_path_factory: pytest.TempPathFactory) -> DenseSource:
    """`dense_source("phi3", dtype=torch.bfloat16)`: a tiny checkpoint to read, never to write into."""
    from support.tiny import make_source

    made: dict[str, Path] = {}

    def source(case: str = "llama", **options: object) -> Path:
        key = f"{case}-{sorted(options.items())}"
        if key not in made:
            made[key] = make_source(tmp_path_factory.mktemp("dense") / case, case, **options)  # type: ignore[arg-type]
        return made[key]

    return source


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand words that the tiny tokenizer knows."""
    from support.tiny import make_text

    return make_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty documents of twenty such words, one a line."""
    from support.tiny import make_documents

    return make_documents(tmp_path_factory.mktemp("text") / "words.jsonl")


@pytest.fixture(scope="session")
def checkpoint(dense_source: DenseSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1R4E2K of a tiny Llama: a random router, dense values; to read, never to write into."""
    from support.tiny import factorize_quietly, weights_only

    out = tmp_path_factory.mktemp("made") / "tiny-1R4E2K"
    factorize_quietly(weights_only(dense_source(), out, top_k=2))
    return out


@pytest.fixture(scope="session")
def refitted(dense_source: DenseSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With shared neurons, an analytic router, fitted scale and refit: its values are no longer the dense ones."""
    from support.tiny import calibrated, factorize_quietly

    out = tmp_path_factory.mktemp("made") / "refitted"
    factorize_quietly(calibrated(dense_source(), out, text_file, top_k=2))
    return out


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of two small tasks, for `--task-data`."""
    from support.evaluating import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the models of an evaluation garbage is collected: half a second each time."""
    monkeypatch.setattr("factorctl.pipeline.evaluate.measure._release_memory", lambda: None)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here does; test_training_recipe.py and test_evaluation_routing.py draw."""
    monkeypatch.setattr("factorctl.pipeline.evaluate.run.draw_fidelity", lambda *_, **__: b"")
    monkeypatch.setattr(
        "factorctl.pipeline.finetune.run.draw_training", lambda run, *_: (run / "training.png").write_bytes(b"")
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a GPU are skipped where there is none, also when they are asked for."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
