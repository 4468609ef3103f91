"""Imports point downwards only: a module may import from the floors below its own, never from beside or above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megagpt"
FLOORS = [
    {"arguments", "errors", "files", "rng", "rows", "segments", "terminal", "watchdog"},
    {"config", "distributed", "launcher", "launches", "network", "permutation", "pickles", "preemption", "tokenizer"},
    {"run_config", "attention", "loss", "optim", "accounting", "data_manifest", "sampler", "early_stopping"},
    {"run_file", "mixture", "shard_format", "model", "state", "augment", "packing", "processor", "starts", "traffic"},
    {"commits", "deepspeed_keys", "health", "lint_rules", "shards", "compilation", "recompute", "memory", "rendezvous"},
    {"checkpoint_list", "plan", "provenance", "samples", "writer"},
    {"data", "guards", "pace", "sample_report", "plan_report", "out_of_memory", "host_probe"},
    {"engine"},
    {"elastic", "lint"},
    {"checkpoint", "evaluate", "generate", "monitor"},
    {"session"},
    {"trainer"},
    {"verify_resume", "probe", "slurm", "doctor"},
    {"__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = [path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]


def imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def megagpt_modules(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports(path)]
    return {p[1] for p in parts if p[0] == "megagpt" and len(p) > 1 and (PACKAGE / f"{p[1]}.py").exists()}


def test_every_module_has_a_floor():
    assert {path.stem for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_import_points_down(path):
    upward = {other for other in megagpt_modules(path) if FLOOR[other] >= FLOOR[path.stem]}
    assert not upward


def test_deepspeed_is_imported_in_the_engine_alone():
    users = {path.stem for path in MODULES if any(name.split(".")[0] == "deepspeed" for name in imports(path))}
    assert users == {"engine"}


def test_only_the_command_imports_inside_functions():
    lazy = set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        inner = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in inner):
            lazy.add(path.stem)
    assert lazy == {"__main__"}


def test_the_builder_needs_neither_torch_nor_an_engine():
    used = {module for path in (ROOT / "data_tools").glob("*.py") for module in megagpt_modules(path)}
    of_data = {"shard_format", "shards", "data_manifest", "tokenizer", "samples", "provenance"}
    assert used <= {"errors", "files", "config", "terminal", *of_data}
