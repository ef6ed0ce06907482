"""The architecture as a test: who imports whom, what no file may touch, and what `--help` may not load."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = {
    "config": 0, "contracts": 0, "errors": 0, "memory": 0, "processor": 0, "progress": 0, "quiet": 0,
    "files": 1, "partitions": 1,
    "checkpoint": 2, "data": 2, "ffn": 2,
    "models": 3, "reporting": 3,
    "calibration": 4, "training": 4, "evaluation": 4, "profiling": 4, "exporting": 4,
    "pipeline": 5,
    "cli": 6,
}  # fmt: skip
"""Part of factorctl -> layer. A part imports only from layers below its own."""

SIDEWAYS = {(part, "errors") for part in ("config", "contracts", "memory")}
"""Imports within a layer that are meant: the ground layer shares its errors."""

VERBS_SHARED = {("evaluate", "factorize"), ("frontier", "factorize")}
"""Verbs that import one another: controls and tried splits are made as layers are; a recipe calls all of them."""

HEAVY = {"torch", "transformers", "datasets", "accelerate", "lm_eval", "matplotlib", "scipy", "ot", "gguf"}
ENTRANCES = {"factorctl/__init__.py", "factorctl/__main__.py"}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part(path: Path) -> str:
    """'models' for factorctl/models/families.py, 'memory' for factorctl/memory.py."""
    return path.relative_to(ROOT / "factorctl").parts[0].removesuffix(".py")


def part_of(module: str) -> str:
    """'models' for factorctl.models.families; '' for factorctl itself."""
    return [*module.split("."), ""][1]


def imports(path: Path, *, only_at_import: bool = False, run: bool = False) -> Iterator[str]:
    """Every module that the file names; `factorctl.models.loading.load` counts as what it is imported from.

    Args:
        only_at_import: leave out what functions import.
        run: leave out what is there for type checkers only.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _run(tree, functions=not only_at_import) if only_at_import or run else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # within a plugin's own package
                assert path.parent.name == "plugins", f"{path}: relative import"
                yield f"factorctl_plugins.{node.module or ''}"
                continue
            assert node.module is not None
            yield node.module
            if node.module == "factorctl":
                yield from (f"factorctl.{alias.name}" for alias in node.names if alias.name in LAYERS)
            elif node.module.count(".") == 1 and node.module.startswith("factorctl."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _run(node: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """The nodes that run, when the module is imported or later in its functions: not those under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if not functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run(child, functions=functions)


def test_every_part_has_a_layer() -> None:
    parts = {path.stem if path.is_file() else path.name for path in (ROOT / "factorctl").iterdir()}
    assert parts - {"__init__", "__main__", "__pycache__", "py"} == LAYERS.keys()


def test_an_installation_holds_every_package_and_file() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.replace(".", "/") for name in settings["packages"]} - {"factorctl_plugins"}
    assert packages == {name_of(path.parent) for path in (ROOT / "factorctl").rglob("__init__.py")}
    others = {
        path for path in (ROOT / "factorctl").rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    named = {path for pattern in settings["package-data"]["factorctl"] for path in (ROOT / "factorctl").glob(pattern)}
    assert others | {ROOT / "factorctl" / "py.typed"} == named


@pytest.mark.parametrize("path", files("factorctl"), ids=name_of)
def test_a_layer_imports_only_from_below(path: Path) -> None:
    if name_of(path) in ENTRANCES:
        return
    here = part(path)
    for module in imports(path):
        there = part_of(module)
        if module.split(".")[0] != "factorctl" or there in ("", here):
            continue
        assert there in LAYERS, f"{name_of(path)} imports {module}"
        allowed = LAYERS[there] < LAYERS[here] or (here, there) in SIDEWAYS
        assert allowed, f"{name_of(path)} (layer {LAYERS[here]}) imports {module} (layer {LAYERS[there]})"


@pytest.mark.parametrize("path", files("factorctl/pipeline"), ids=name_of)
def test_verbs_know_one_another_only_where_meant(path: Path) -> None:
    here = path.relative_to(ROOT / "factorctl/pipeline").parts[0]
    for module in imports(path):
        if module.startswith("factorctl.pipeline."):
            there = module.split(".")[2]
            assert here == "recipe" or there in (here, "common") or (here, there) in VERBS_SHARED, module


@pytest.mark.parametrize("path", files("factorctl/cli"), ids=name_of)
def test_the_command_line_reaches_no_deeper_than_the_pipeline(path: Path) -> None:
    """Types of what the pipeline returns may come from where they are defined."""
    for module in imports(path, run=True):
        there = part_of(module)
        if module.split(".")[0] == "factorctl" and there not in ("", "cli", "pipeline"):
            assert LAYERS[there] == 0, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", files("plugins"), ids=name_of)
def test_a_plugin_imports_only_the_contracts(path: Path) -> None:
    ours = {module for module in imports(path) if module.split(".")[0] in ("factorctl", "factorctl_plugins")}
    for module in ours:
        assert module.startswith(("factorctl.contracts", "factorctl_plugins")), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", files("factorctl", "plugins"), ids=name_of)
def test_only_the_renderer_draws(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    if name_of(path) != "factorctl/cli/render.py":
        assert "rich" not in roots
    assert "click" not in roots, "typer brings its own"
    assert not roots & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", files("factorctl/cli"), ids=name_of)
def test_the_command_line_loads_nothing_heavy_at_import(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path, only_at_import=True)}
    assert not roots & HEAVY, name_of(path)


def ground() -> list[Path]:
    return [path for path in files("factorctl") if LAYERS.get(part(path)) == 0]


@pytest.mark.parametrize("path", ground(), ids=name_of)
def test_the_ground_layer_loads_nothing_heavy_at_import(path: Path) -> None:
    assert not {m.split(".")[0] for m in imports(path, only_at_import=True)} & HEAVY


def calls(path: Path) -> Iterator[ast.Call]:
    yield from (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call))


@pytest.mark.parametrize("path", files("factorctl", "plugins"), ids=name_of)
def test_no_code_from_a_checkpoint_is_ever_run(path: Path) -> None:
    for call in calls(path):
        assert ast.unparse(call.func) not in {"torch.load", "torch.save", "eval", "exec", "pickle.loads"}, call.lineno
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert ast.unparse(keyword.value) == "False", f"{name_of(path)}:{call.lineno}"


@pytest.mark.parametrize("arguments", [["--help"], ["factorize", "--help"], ["--version"]], ids=" ".join)
def test_help_loads_neither_torch_nor_transformers(arguments: list[str]) -> None:
    script = (
        "import sys\nsys.argv = ['factorctl', *sys.argv[1:]]\nfrom factorctl.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('LOADED', sorted({'torch', 'transformers', 'datasets', 'numpy', 'scipy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "LOADED []"


def test_importing_the_package_loads_nothing_heavy_but_offers_load() -> None:
    script = "import sys, factorctl\nassert 'torch' not in sys.modules\nprint(factorctl.load.__module__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "factorctl.models.loading"
