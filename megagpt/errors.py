"""The exception for mistakes that a user can correct, which commands print as one message without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something that the user gave is wrong: one message, exit code 2, no traceback."""


class OwnRankError(UserError):
    """An error of this rank alone, which therefore prints it; any other UserError is raised alike on every rank."""


def raised_on_every_rank(error: BaseException | None) -> bool:
    """Tell whether all ranks end with this error, so that collectives in flight will complete."""
    return error is None or (isinstance(error, UserError) and not isinstance(error, OwnRankError))


@contextmanager
def writing_to(out_dir: Path) -> Iterator[None]:
    """Turn an OSError while writing to a run's folder into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"megagpt.out_dir={out_dir} cannot be written: {error}; free disk space, allow writing there, or "
            "set another folder"
        ) from error
