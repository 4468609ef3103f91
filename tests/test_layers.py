"""Imports point down: a package imports only from those that stand below it, and no module imports in a circle."""

import ast
from pathlib import Path

import pytest
from import_graph import circles, floors, import_graph, modules, nodes_of, package_of

ROOT = Path(__file__).parents[1]
ORDER = [  # lowest first; a package may import from those of lower lines, and from no other of its own line
    {"megagpt", "megagpt.errors", "megagpt.atomic_files", "megagpt.file_lock", "megagpt.open_files"},
    {"megagpt.terminal", "megagpt.user_paths", "megagpt.git_pointers", "megagpt.html_parts", "megagpt.new_folder"},
    {"megagpt.options", "megagpt.svg_plots"},
    {"megagpt.config", "megagpt.distributed", "megagpt.tokenizer"},
    {"megagpt.train_state", "megagpt.data"},
    {"megagpt.model"},
    {"megagpt.engine", "megagpt.planner"},
    {"megagpt.checkpoint", "megagpt.guards", "megagpt.lint"},
    {"megagpt.metrics", "megagpt.evaluation"},
    {"megagpt.train"},
    {"megagpt.language_model", "megagpt.huggingface", "megagpt.report", "megagpt.tuning"},
    {"megagpt.cli"},
    {"megagpt.__main__", "megagpt.train.__main__"},
]
BUILDER_ORDER = [
    {"data_tools", "data_tools.option_types", "data_tools.formatting"},
    {"data_tools.executor"},
    {"data_tools.storage", "data_tools.filters"},
    {"data_tools.dedup"},
    {"data_tools.config"},
    {"data_tools.readers"},
    {"data_tools.stages"},
    {"data_tools.report"},
    {"data_tools.publish", "data_tools.verify", "data_tools.inspect"},
    {"data_tools.build"},
    {"data_tools.compare_tokenizers"},
    {"data_tools.arguments"},
    {"data_tools.__main__"},
]
# what the builder uses of megagpt: none of it imports torch (data_tools/test_arrow_columns.py looks at a real build)
OF_MEGAGPT = {"errors", "atomic_files", "file_lock", "terminal", "options", "user_paths", "open_files"}
OF_MEGAGPT |= {"git_pointers", "html_parts", "svg_plots"}
OF_MEGAGPT |= {"config.mistakes", "config.parsing", "config.schema_keys", "checkpoint.run_samples"}
OF_MEGAGPT |= {f"data.{name}" for name in ("manifest", "shard_format", "dataset", "provenance")}
OF_MEGAGPT |= {"tokenizer.segment_cache", "tokenizer.sentencepiece_model", "tokenizer.tokenizer", "data.training_set"}
OF_MEGAGPT |= {"distributed.rank_variables"}
FILES = modules(ROOT)
FLOOR = {package: i for order in (ORDER, BUILDER_ORDER) for i, line in enumerate(order) for package in line}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """The import graph, without what `megagpt.load` loads when it is called, so that nothing waits for it."""
    found = import_graph(ROOT)
    assert found["megagpt"] == {"megagpt.language_model"}
    return {**found, "megagpt": set()}


def test_every_package_has_a_place_in_the_order():
    assert {package_of(module) for module in FILES} == FLOOR.keys()


@pytest.mark.parametrize("module", FILES)
def test_every_import_between_packages_points_down(imports, module):
    own, side = package_of(module), module.split(".")[0]
    others = {package_of(other) for other in imports[module] if other.split(".")[0] == side} - {own, side}
    assert not {other for other in others if FLOOR[other] >= FLOOR[own]}


def test_no_module_imports_in_a_circle(imports):
    assert circles(imports) == []


def test_a_circle_is_found_and_raises_no_floor():
    """a and b import each other; c imports b, and d stands on the ground."""
    graph = {"a": {"b"}, "b": {"a", "d"}, "c": {"b"}, "d": set()}
    assert circles(graph) == [{"a", "b"}]
    assert floors({"c": {"b"}, "b": {"d"}, "d": set()}) == {"d": 1, "b": 2, "c": 3}


def test_deepspeed_is_imported_below_the_engine_alone():
    users = {module for module, path in FILES.items() if "deepspeed" in external(path)}
    assert users
    assert {package_of(module) for module in users} == {"megagpt.engine"}


def external(path: Path) -> set[str]:
    """The first words of what a file imports."""
    nodes = nodes_of(path)
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in named}


def test_only_what_must_start_fast_imports_inside_functions():
    lazy = set()
    for module, path in FILES.items():
        inner = [n for f in nodes_of(path) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in inner) and module.startswith("megagpt"):
            lazy.add(module)
    assert lazy <= {"megagpt", "megagpt.__main__", "megagpt.cli.pretrain"}


def test_the_builder_needs_neither_torch_nor_an_engine(imports):
    used = {other for module, found in imports.items() if module.startswith("data_tools") for other in found}
    assert {name.removeprefix("megagpt.") for name in used if name.startswith("megagpt.")} <= OF_MEGAGPT


@pytest.mark.parametrize("module", [module for module, path in FILES.items() if path.name == "__init__.py"])
def test_an_init_file_re_exports_nothing(module):
    """One line says what the package is for: importing a module of it imports nothing else."""
    body = ast.parse(FILES[module].read_text()).body
    assert not [node for node in body if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megagpt")]
