"""Show generated texts in the terminal: the first lines of some of them, and nothing that a terminal would act on."""

import shutil
from collections.abc import Sequence

from megagpt.terminal import counted

TEXTS, LINES = 3, 4  # of each step, of each text
NO_TERMINAL = (100, 24)


def sample_lines(samples: Sequence[tuple[str, str]], step: int) -> list[str]:
    """Return lines that show texts generated at a step, each given as prompt and continuation."""
    lines = []
    for prompt, continuation in samples[:TEXTS]:
        lines.append(
            f"sample at step {step}, after {prompt!r}:" if prompt else f"sample at step {step}, a new document:"
        )
        lines += _first_lines(continuation)
    more = len(samples) - TEXTS
    return lines if more <= 0 else [*lines, f"... and {counted(more, 'more text')}"]


def _first_lines(text: str) -> list[str]:
    width = shutil.get_terminal_size(NO_TERMINAL).columns - len("  | ...")
    written = [line for line in text.expandtabs(4).split("\n") if line.strip()]
    shown = [_harmless(line) for line in written[:LINES]] or ["(it ended at once)"]
    cut = [line if len(line) <= width else line[: width - 3] + "..." for line in shown]
    return [f"  | {line}" for line in cut] + ["  | ..."] * (len(written) > LINES)


def _harmless(line: str) -> str:
    """Escape what is not printable, such as a carriage return, the codes of a terminal, and marks that reverse text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
