"""The exception for mistakes that a user can correct, which commands print as one message without a traceback."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EISDIR, ELOOP, EMFILE, ENAMETOOLONG, ENFILE, ENOTDIR
from pathlib import Path

UNUSABLE = {EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOTDIR}
MAX_MAPS = Path("/proc/sys/vm/max_map_count")


class UserError(ValueError):
    """Something that the user gave is wrong: one message, exit code 2, no traceback."""


class OwnRankError(UserError):
    """An error of this rank alone, which therefore prints it; any other UserError is raised alike on every rank."""


def raised_on_every_rank(error: BaseException | None) -> bool:
    """Tell whether all ranks end with this error, so that collectives in flight will complete."""
    return error is None or (isinstance(error, UserError) and not isinstance(error, OwnRankError))


@contextmanager
def writing_to(folder: Path | str, key: str = "megagpt.out_dir") -> Iterator[None]:
    """Turn an OSError while writing to a run's folder, or to another one that a key names, into a UserError."""
    try:
        yield
    except OSError as error:
        if limit := limit_reached(error):
            raise limit from error
        raise UserError(
            f"{key}={folder} cannot be written: {error}; free disk space, allow writing there, or set another folder"
        ) from error


def limit_reached(error: BaseException) -> UserError | None:
    """Return the error to raise instead if a limit of open files or memory maps is behind this one, and None if not."""
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number == EMFILE:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            way_out = f"run `ulimit -n {hard}`" if soft < hard else "raise nofile in /etc/security/limits.conf"
            return UserError(f"too many open files: the limit is {soft} (`ulimit -n`); {way_out} and start again")
        if number == ENFILE:
            return UserError("too many open files on this host; raise the sysctl fs.file-max and start again")
        if "Memory mapping file failed: Cannot allocate memory" in str(cause):
            most = MAX_MAPS.read_text().strip() if MAX_MAPS.is_file() else "unknown"
            return UserError(
                f"too many memory maps (the sysctl vm.max_map_count is {most}) or too little address space "
                "(`ulimit -v`); raise the limit and start again"
            )
    return None


def unusable_path(error: BaseException) -> UserError | None:
    """Return the error to raise instead for a path that can never be opened as it is, and None for another error."""
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
        return UserError(
            f"path {error.filename!r} cannot be used: {error.strerror}; give another, or allow access to it"
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
