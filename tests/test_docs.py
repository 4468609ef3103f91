"""The documentation stays true: links resolve, named files and definitions exist, lines can be reviewed in a diff."""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Pages that describe the project as it is. The two RESULTS.md and CHANGELOG.md are history.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(ROOT / folder / "README.md" for folder in ("ds_configs", "launch")),
    *sorted((ROOT / "docs").glob("*.md")),
]
HISTORY = [ROOT / name for name in ("CHANGELOG.md", "tests/benchmarks/RESULTS.md", "tests/faults/RESULTS.md")]
LONGEST = 120
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACE = re.compile(r"`([\w/.]+\.py): ([A-Za-z_][\w.]*)`")  # `file: definition`
FILE = re.compile(r"`((?:megagpt|data_tools|ds_configs|launch|tests|docs)/[\w/.]*\w\.(?:py|json|sbatch|sh|md))`")
# Phrases that have a plainer form: resume, again, fix, report, divide, without success, this many.
TO_AVOID = re.compile(r"\b(?:go on|goes on|went on|anew|mends?|shared? out|in vain|so many|(?:put|set)s? aside)\b")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def definitions(path: Path) -> set[str]:
    """Names that a file defines at its top level, and `Class.name` for what a class body defines."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found |= _names(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in _names(inner)}
    return found


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", [*PAGES, *HISTORY], ids=page_id)
def test_every_relative_link_leads_to_a_file(page):
    links = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *HISTORY], ids=page_id)
def test_lines_of_markdown_fit_into_a_diff(page):
    """Rows of a table cannot be broken."""
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > LONGEST and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_prose_uses_plain_words(page):
    text = " ".join(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).split())
    assert TO_AVOID.findall(text) == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_and_definitions_that_a_page_names_exist(page):
    text = page.read_text()
    assert [name for name in FILE.findall(text) if not (ROOT / name).is_file()] == []
    places = PLACE.findall(text)
    assert [(path, name) for path, name in places if name not in definitions(ROOT / path)] == []


def test_every_row_of_where_do_i_change_names_a_definition():
    _, _, section = (ROOT / "README.md").read_text().partition("## Where do I change")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    assert [row for row in rows if not PLACE.search(row)] == []


def test_every_fault_of_use_names_its_test():
    lines = (ROOT / "docs" / "faults_of_use.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| what a user does")]
    assert [row for row in rows if not PLACE.search(row)] == []


def test_every_patched_or_private_name_still_occurs_in_its_file():
    """A row of docs/patches.md that no longer holds is removed there."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.*?) \|", (ROOT / "docs" / "patches.md").read_text(), re.MULTILINE)
    named = [(path, name) for path, names in rows for name in re.findall(r"`([\w.]+)`", names)]
    assert len(named) >= 20
    assert [(path, name) for path, name in named if name not in (ROOT / path).read_text()] == []


def test_every_private_name_of_deepspeed_or_torch_that_is_used_has_a_row():
    """A name with a leading underscore that the file itself does not define is another's, and may change there."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.*?) \|", (ROOT / "docs" / "patches.md").read_text(), re.MULTILINE)
    named = {
        (path, part) for path, names in rows for name in re.findall(r"`([\w.]+)`", names) for part in name.split(".")
    }
    public = {"_exit", "_C", "_functorch"}  # of `os`; packages of torch, whose names that are used have rows
    for path in (ROOT / "megagpt").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr)}
        own = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        page = str(path.relative_to(ROOT))
        assert [name for name in used - own - public if (page, name) not in named] == [], page


def test_readme_can_be_read_at_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 210


SOURCES = sorted(path for part in ("megagpt", "data_tools", "launch") for path in (ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=page_id)
def test_docstrings_comments_and_messages_use_plain_words(path):
    with tokenize.open(path) as file:
        source = file.read()
    if not TO_AVOID.search(source):
        return  # as most files, of which none has to be taken apart
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    text = [token.string for token in tokens if token.type in (tokenize.STRING, tokenize.COMMENT)]
    assert [found for string in text for found in TO_AVOID.findall(string)] == []
