"""Tell what a file that cannot be read as JSON is instead, and how to write it."""

import re
from difflib import get_close_matches
from pathlib import Path

from megagpt.terminal import typed

# Formats in which other trainers are configured, by the ending of a file.
OTHER_FORMATS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".py": "Python", ".ini": "INI", ".cfg": "INI"}
PYTHON = {"True": "true", "False": "false", "None": "null"}


def way_out(text: str, suffix: str, line: int, column: int) -> str:
    """Return the end of a message about text that is no JSON from this place on; "" where the place says enough."""
    if kind := OTHER_FORMATS.get(suffix.lower()):
        return f"; it is {kind}, and must be JSON, which may have comments (//)"
    # The parser may notice a word some letters after its beginning, in another word's.
    shown = text.split("\n")[line - 1] if line <= text.count("\n") + 1 else ""
    before, after = shown[max(0, column - 2) : column], shown[max(0, column - 1) :]
    if word := next((word for word in PYTHON if after.startswith(word)), None):
        return f"; write {PYTHON[word]} instead of {word}, as in JSON"
    if after.startswith("#"):
        return "; write comments with // instead of #"
    if re.search(r"[\u201c\u201d\u2018\u2019]", before + after[:1]):
        return '; write straight quotation marks, "'
    if re.match(r"_\d", after) or re.match(r"\d_", before):
        return "; write numbers without _"
    if not text.lstrip().startswith(("{", "[", "/")):
        return "; JSON begins with {, and names stand in quotation marks"
    # A name or value in quotation marks follows a comma, unless it comes first or is a value.
    written = re.sub(r"//[^\n]*", "", "\n".join([*text.split("\n")[: line - 1], shown[: max(0, column - 1)]])).rstrip()
    if after.startswith('"') and written and written[-1] not in "{[,:":
        return f"; a comma may be missing at the end of line {1 + written.count(chr(10))}"
    missing = text.count("{") - text.count("}")
    return f"; {'}' * min(missing, 9)} may be missing at the end" if not after.strip() and missing > 0 else ""


def not_a_file(path: Path) -> str:
    """Return the end of a message about a folder in the place of a file: the file in it that is meant."""
    if (path / "run.json").is_file():
        return f"it is a run's folder; give {typed(path / 'run.json')}"
    if (path / "manifest.json").is_file():
        return f"it is a dataset; `megagpt init {typed(path)}` writes a run file for it"
    found = sorted(other.name for other in path.glob("*.json*"))
    return f"it is a folder; give a file in it{f', such as {typed(path / found[0])}' if found else ''}"


def near(path: Path) -> str:
    """Return the end of a message about a path that there is no file at: the file next to it of nearly that name."""
    try:
        names = {other.stem: other.name for other in path.parent.iterdir() if ".json" in other.suffix}
    except OSError:
        return ""
    found = get_close_matches(path.stem, names, n=1, cutoff=0.7)
    return f"; did you mean {typed(path.parent / names[found[0]])}?" if found else ""
