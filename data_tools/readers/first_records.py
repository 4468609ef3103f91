"""Read the first record of the input files before any work starts, so that a mistake ends a build in seconds."""

from collections.abc import Sequence

from data_tools.config import SourceConfig
from data_tools.executor.progress import warn
from data_tools.readers.by_format import FORMATS, METADATA, read_slice
from data_tools.readers.input_file import InputFile, UnreadableFile

TRIED, TRIED_REMOTE = 5_000, 8  # files of a source that are opened: some seconds


def check_first_records(source: SourceConfig, files: Sequence[InputFile], *, strict: bool) -> None:
    """Raise UserError if the first record cannot be read: of a file that the user named, or of all those tried.

    With `strict`, that of any of them. Otherwise files found in folders are named in a warning.
    """
    data = [file for file in files if file.size and file.kind != METADATA]
    tried = data[: TRIED_REMOTE if _is_slow(source, data) else TRIED]
    failed = [error for file in tried if (error := _error_of(file, source, strict or file.named))]
    if not failed:
        return
    if len(failed) == len(tried):
        raise failed[0]
    warn(
        f"{len(failed)} of the first {len(tried)} files of {source.name} cannot be read, and will be left "
        f"out; the first: {failed[0]}"
    )


def _is_slow(source: SourceConfig, files: Sequence[InputFile]) -> bool:
    """Tell whether opening a file takes long: over a network, or where its encoding is detected."""
    return source.encoding == "auto" or any("://" in file.path for file in files)


def _error_of(file: InputFile, source: SourceConfig, must_be_readable: bool) -> UnreadableFile | None:
    try:
        first_slice = next(iter(FORMATS[file.kind].cut(file, file.size)), None)
        if first_slice is not None:
            next(read_slice(first_slice, source, strict=False), None)
    except UnreadableFile as error:
        if must_be_readable:
            raise
        return error
    return None
