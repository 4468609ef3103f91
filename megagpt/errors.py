"""The one exception that means: the user can mend this."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """What the user gave is wrong: printed as one message, exit code 2, no traceback."""


class OwnRankError(UserError):
    """Seen by this rank alone, which therefore prints it itself; any other UserError is the same on every rank."""


def raised_on_every_rank(error: BaseException | None) -> bool:
    """Whether all ranks come to the same end, so that what they have under way together will end too."""
    return error is None or (isinstance(error, UserError) and not isinstance(error, OwnRankError))


@contextmanager
def writing_to(out_dir: Path) -> Iterator[None]:
    """Raises UserError if the disk, or its rights, are against a run's folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"megagpt.out_dir={out_dir} cannot be written: {error}; mend that, or set another folder"
        ) from error
