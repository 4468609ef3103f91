"""Print text with letters that the terminal's encoding may lack: a model's samples, bars, paths."""

import io
import sys


def escape_unknown_letters() -> None:
    """Let stdout write `\\xe9` for a letter that its encoding lacks; by default Python raises UnicodeEncodeError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
