"""With which code a command ends: 0 finished, 2 what the user gave is wrong, 75 saved and wants to go on."""

import sys
from collections.abc import Callable

from megagpt.errors import UserError
from megagpt.terminal import escape_unknown_letters

SAVED_AND_WANTS_RESTART = 75  # EX_TEMPFAIL of sysexits.h


def exit_code_of(command: Callable[[], int]) -> int:
    """The command's exit code; 2 and one line for what the user gave that is wrong."""
    escape_unknown_letters()
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
