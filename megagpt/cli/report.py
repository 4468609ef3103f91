"""`megagpt report RUN [RUN ...]`: write an HTML page about one or several runs."""

import argparse
from datetime import datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from megagpt.atomic_files import written
from megagpt.errors import UserError
from megagpt.terminal import counted, show, typed

REPORT = "report.html"


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    if find_spec("matplotlib") is None:
        raise UserError("report needs matplotlib; install with pip install matplotlib")
    runs = import_module("megagpt.report.run_record").read_runs(args.runs)
    page = import_module("megagpt.report.page")
    # Of several runs none is the place.
    out: Path = args.out or (runs[0].path / REPORT if len(runs) == 1 else Path(REPORT))
    _refuse_to_overwrite(out, page.GENERATOR)
    content = page.page_of(runs, datetime.now())
    try:
        with written(out) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another place by --out FILE.html") from error
    show(f"{out}: the report on {counted(len(runs), 'run')}; a browser opens it")
    return 0


def _refuse_to_overwrite(out: Path, generator: str) -> None:
    """Raise UserError unless `out` is the name of a new page, or of one that this command wrote."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file, such as --out {typed(out / REPORT)}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: the report is an HTML page; give a name that ends in .html")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it with mkdir -p {typed(out.parent)}")
    if out.exists() and f'<meta name="generator" content="{generator}">'.encode() not in _beginning(out):
        raise UserError(f"{out} was not written by megagpt report, and stays as it is; give another --out FILE.html")


def _beginning(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(1000)
