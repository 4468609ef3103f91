"""Exit codes: 0 finished, 2 something the user gave is wrong, 75 saved and to be started again, 1 anything else."""

import sys
from collections.abc import Callable

from megagpt.errors import UserError, limit_reached
from megagpt.terminal import escape_unknown_letters

SAVED_AND_WANTS_RESTART = 75  # EX_TEMPFAIL of sysexits.h


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; a UserError is printed as one line and returns 2."""
    escape_unknown_letters()
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if (limit := limit_reached(error)) is None:
            raise
        print(f"error: {limit}", file=sys.stderr)
        return 2
