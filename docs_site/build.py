"""Build the documentation site into build/docs/html: python -m docs_site.build

Pages keep the places that they have in the repository, so that links between them hold here and on a code host. What
is generated is written from the code each time, and never committed. Warnings and dead links end the build.
"""

import logging
import os
import shutil
import sys
from pathlib import Path

try:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort
except ModuleNotFoundError:
    sys.exit("the site needs mkdocs and its theme; get them with: pip install -e '.[docs]'")

from docs_site import links
from docs_site.commands_page import commands_page
from docs_site.files_page import files_page
from docs_site.results_page import write_results
from docs_site.run_file_page import build_options_page, run_file_page
from megagpt.errors import UserError

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "docs"
# README.md would be the start page of the folder, which the site has a shorter one for.
COPIED = {"README.md": "overview.md"} | {
    name: name
    for name in (
        *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "ds_configs/README.md", "launch/README.md"),
        *("tests/benchmarks/RESULTS.md", "tests/faults/RESULTS.md"),
    )
}


def main() -> int:
    """Build and check the site; return 0 only without a warning or a dead link."""
    logging.basicConfig(format="%(levelname)s: %(message)s")  # else mkdocs only counts its warnings
    try:
        wrong, elsewhere = build_site(BUILD)
    except (Abort, UserError) as error:
        print(error, file=sys.stderr)
        return 1
    (BUILD / "links_elsewhere.txt").write_text("\n".join(elsewhere) + "\n")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(wrong)} dead links, {len(elsewhere)} to other sites not followed: build/docs/links_elsewhere.txt")
    print("build/docs/html/index.html is the site; its search needs a server:")
    print("  python -m http.server --bind 127.0.0.1 --directory build/docs/html")
    return 1 if wrong else 0


def build_site(folder: Path) -> tuple[list[str], list[str]]:
    """Write the site to FOLDER/html; return what links.check finds. Raises Abort if mkdocs warns of something."""
    shutil.rmtree(folder, ignore_errors=True)
    collect(folder / "pages")
    generate(folder / "pages")
    shutil.copy(ROOT / "docs_site" / "mkdocs.yml", folder)
    # Material announces another generator unless this is set.
    os.environ["NO_MKDOCS_2_WARNING"] = "true"
    build(load_config(str(folder / "mkdocs.yml"), strict=True))
    return links.check(folder / "html")


def collect(pages: Path) -> None:
    """Copy the pages and pictures of the repository, and those of the site alone."""
    shutil.copytree(ROOT / "docs_site" / "pages", pages)
    shutil.copytree(ROOT / "docs", pages / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for source, target in COPIED.items():
        (pages / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, pages / target)


def generate(pages: Path) -> None:
    """Write the pages that come from the code and from measurements."""
    for name, text in (
        ("reference/run_file.md", run_file_page()),
        ("reference/build_options.md", build_options_page()),
        ("reference/commands.md", commands_page()),
        ("docs/files.md", files_page()),
    ):
        (pages / name).write_text(text, encoding="utf-8")
    write_results(pages / "results")


if __name__ == "__main__":
    sys.exit(main())
