"""Print the import graph of a checkout: rooms, floors, arrows and circles, of modules and of packages.

    python tests/import_graph.py [CHECKOUT]

A room is a module, or a package seen as one. An arrow is an import between two rooms. A room stands one floor above the
highest one that it imports. A circle is a set of rooms that import each other.
"""

import ast
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module below megagpt/ and data_tools/; an `__init__` has its package's name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("megagpt", "data_tools")
        for path in sorted((root / package).rglob("*.py"))
    }


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, at any depth of its code."""
    files = modules(root)
    return {name: _imports(path, files) - {name} for name, path in files.items()}


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Every node of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _imports(path: Path, files: Mapping[str, Path]) -> set[str]:
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    # a name that is imported from a module stands for the module
    return {name if name in files else name.rpartition(".")[0] for name in found} & files.keys()


def package_of(module: str) -> str:
    """megagpt.data.loader -> megagpt.data; a program's own file stands for itself."""
    return module if module.endswith("__main__") else ".".join(module.split(".")[:2])


def of_packages(graph: Graph) -> dict[str, set[str]]:
    """The graph with each package as one room."""
    found: dict[str, set[str]] = {package_of(module): set() for module in graph}
    for module, others in graph.items():
        found[package_of(module)] |= {package_of(other) for other in others} - {package_of(module)}
    return found


def circles(graph: Graph) -> list[set[str]]:
    """The sets of rooms that reach each other."""
    reach = {room: _reached(graph, room) for room in graph}
    sets = {frozenset(other for other in reach[room] if room in reach[other]) for room in graph if room in reach[room]}
    return [set(one) for one in sorted(sets, key=sorted)]


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    ahead = set(graph[start])
    while ahead:
        found |= ahead
        ahead = {other for room in ahead for other in graph[room]} - found
    return found


def floors(graph: Graph) -> dict[str, int]:
    """Room -> its floor, from 1 on; the rooms of a circle stand on one floor."""
    height: dict[str, int] = {}
    reach = {room: _reached(graph, room) for room in graph}
    for room in sorted(graph, key=lambda room: len(reach[room])):  # whoever reaches more stands higher, or alike
        below = [height.get(other, 0) for other in graph[room] if room not in reach[other]]
        height[room] = 1 + max(below, default=0)
    return height


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    graph = import_graph(root)
    for part in ("megagpt", "data_tools"):
        own = {
            module: {other for other in graph[module] if _side(other) == part}
            for module in graph
            if _side(module) == part
        }
        for title, rooms in (("modules", own), ("packages", of_packages(own))):
            found, arrows = circles(rooms), sum(map(len, rooms.values()))
            height = max(floors(rooms).values())
            print(f"{part}, {title}: {len(rooms)} rooms, {height} floors, {arrows} arrows, {len(found)} circles")
            for circle in found:
                print(f"  circle: {', '.join(sorted(circle))}")


def _side(module: str) -> str:
    return module.split(".")[0]


if __name__ == "__main__":
    main()
