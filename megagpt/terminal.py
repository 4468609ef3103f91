"""Print results and errors: in any encoding, to readers that may be gone, and never more of an error than a screen."""

import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from megagpt.errors import OwnRankError, UserError, limit_reached, unusable_path

# Exit codes besides 0: something that the user gave is wrong; EX_TEMPFAIL of sysexits.h; Ctrl-C, 128 + SIGINT.
MISTAKE, SAVED_AND_WANTS_RESTART, INTERRUPTED = 2, 75, 130
SCREEN_LINES, SCREEN_CHARACTERS = 20, 1500
# Colors by their ANSI numbers: of a warning, and of what is good.
YELLOW, GREEN = 33, 32

Copy = Callable[[str, TextIO], None]
_copies: list[Copy] = []  # each is called with all that is printed, and where


def builder_command() -> str:
    """Return how the dataset builder is called, as this process was: advice names a command that works as typed."""
    started = Path(sys.argv[0])
    if (started.parent.name, started.name) == ("megagpt", "__main__.py"):
        return "python -m megagpt data"
    return "megagpt data" if started.name == "megagpt" else "python -m data_tools"


def exit_code_of(
    command: Callable[[], int], *, is_main: Callable[[], bool] = lambda: True, interrupted: str = "interrupted"
) -> int:
    """Run a command and return its exit code; a UserError is printed, without a traceback, and returns 2.

    An error is printed once: by rank 0, unless it is one of another rank alone.
    """
    escape_unknown_letters()
    try:
        return command()
    except UserError as error:
        if isinstance(error, OwnRankError) or is_main():
            print_error(f"error: {on_a_screen(str(error))}")
        return MISTAKE
    except Exception as error:
        if (mistake := limit_reached(error) or unusable_path(error)) is None:
            raise
        print_error(f"error: {on_a_screen(str(mistake))}")
        return MISTAKE
    except KeyboardInterrupt:
        print_error(interrupted)
        return INTERRUPTED


def typed(word: str | Path) -> str:
    """Return a word, such as a path with a blank in it, as a shell takes it: for the commands that messages advise."""
    return shlex.quote(str(word))


@contextmanager
def copied_to(copy: Copy) -> Iterator[None]:
    """Hand a copy of what is printed inside `with` to a function, which must not raise: the text and its stream."""
    _copies.append(copy)
    try:
        yield
    finally:
        _copies.remove(copy)


def show(text: str, *, end: str = "\n", color: int | None = None) -> bool:
    """Print on standard output, at once; return whether it has a reader. What `... | head` has no use for is dropped.

    Raises UserError if the output cannot be written, as on a full disk.
    """
    _copy(text + end, sys.stdout)
    escape_unknown_letters()
    try:
        print(colored(text, color), end=end, flush=True)
    except BrokenPipeError:
        _drop(sys.stdout)
        return False
    except OSError as error:
        _drop(sys.stdout)
        raise UserError(f"standard output cannot be written: {error.strerror}; redirect it to another place") from error
    return True


def print_error(text: str) -> None:
    """Print on standard error, at once; nothing happens where it is closed or its reader is gone."""
    _copy(text + "\n", sys.stderr)
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def _copy(text: str, stream: TextIO) -> None:
    for copy in _copies:
        copy(text, stream)


def colored(text: str, color: int | None) -> str:
    """Return text in a color if standard output is a terminal that has some and NO_COLOR (no-color.org) is unset."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if color is None or plain or not sys.stdout.isatty():
        return text
    return f"\x1b[{color}m{text}\x1b[0m"


def escape_unknown_letters() -> None:
    """Let stdout write `\\xe9` for a letter that its encoding lacks; by default Python raises UnicodeEncodeError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def if_encodable(letter: str, otherwise: str) -> str:
    """Return the letter if standard output's encoding has it."""
    try:
        letter.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return otherwise
    return letter


def counted(n: int, noun: str) -> str:
    """Return "1 step", "2 steps", "1,000 steps"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in the unit that it is read in: "120 us", "35 ms", "4.2 s", "12 min", "3.5 hours", "16 days"."""
    units = (
        (1e-6, "us", 1e-3),
        (1e-3, "ms", 1.0),
        (1.0, "s", 120.0),
        (60.0, "min", 7200.0),
        (3600.0, "hours", 172_800.0),
    )
    for size, unit, below in units:
        if seconds < below:
            return f"{_rounded(seconds / size)} {unit}"
    return f"{_rounded(seconds / 86_400)} days"


def _rounded(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:,.0f}"


def on_a_screen(text: str) -> str:
    """Return a message of at most a screen: from a longer one the middle is left out, and the way out at its end stays.

    A file name, a value or a line of data in it can have megabytes.
    """
    lines = text.split("\n")
    if len(lines) > SCREEN_LINES:
        left_out = len(lines) - SCREEN_LINES + 1
        text = "\n".join([*lines[:12], f"... {left_out:,} more lines ...", *lines[12 + left_out :]])
    if len(text) > SCREEN_CHARACTERS:
        left_out = len(text) - SCREEN_CHARACTERS
        text = f"{text[:1000]} ... {left_out:,} more characters ... {text[1000 + left_out :]}"
    return text


def _drop(stream: TextIO) -> None:
    """Let a stream write to nowhere, what it has buffered too; Python would complain of that at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
