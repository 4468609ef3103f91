"""docs/tutorial.md is run as it stands, without its first step (pip), and with less time to train."""

import re
import subprocess
import sys
from pathlib import Path

import json5
import pytest
from support import environment
from test_examples import blocks

from megagpt.config.parsing import leaves

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
LESS = {"--hours 0.1": "--hours 0.005", "time_limit_minutes=0.2": "time_limit_minutes=0.08"}
NUMBER = re.compile(r"\d[\d,.:]*(?:e[-+]\d+)?")
SAVED = 75  # the exit code of a run that can be resumed


def masked(line: str) -> str:
    """A line of output with its numbers and blanks made alike."""
    return " ".join(NUMBER.sub("0", line).split())


@pytest.mark.process
@pytest.mark.long
def test_every_command_of_the_tutorial_works_and_prints_what_it_shows(tmp_path):
    output, n_compared = "", 0
    for language, text in blocks(TUTORIAL):
        if language in ("sh", "python") and "pip install" not in text:
            output = _run(language, text, tmp_path)
        elif language == "text":
            printed = {masked(line) for line in output.splitlines()}
            missing = [line for line in map(masked, text.splitlines()) if not any(line in other for other in printed)]
            assert missing == [], output
            n_compared += 1
        elif language == "json5":
            written = dict(leaves(json5.loads((tmp_path / "mine.jsonc").read_text())))
            assert dict(leaves(json5.loads(text))).keys() <= written.keys()
    assert n_compared >= 9


def _run(language: str, text: str, folder: Path) -> str:
    """Run a block in a folder; return what it prints."""
    for long, short in LESS.items():
        text = text.replace(long, short)
    command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    variables = environment()
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    ran = subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert ran.returncode in (0, SAVED), f"{text}\n{ran.stdout}"
    return ran.stdout
