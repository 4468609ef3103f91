"""Read text files: the whole file is a document, or each part of it that ends in a separator."""

import itertools
from collections.abc import Iterator
from functools import partial

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import PIECE_CHARACTERS, DocumentPiece, Note, Pieces, SkippedRecord, cut, cut_at
from data_tools.readers.formats.encodings import BLOCK, NotTextError, blocks, decoded, encoding_of
from data_tools.readers.input_file import FileSlice, UnreadableFile
from data_tools.readers.open_file import open_bytes


def read_text(slice_: FileSlice, source: SourceConfig) -> Pieces:
    """Yield the documents of a text file. A file that is not text is skipped if found in a folder, refused if named."""
    path, at = slice_.file.path, partial(str, slice_.file.path)
    with open_bytes(slice_.file) as raw:
        head = raw.read(BLOCK)
        try:
            encoding = encoding_of(head, source.encoding)
            separator = source.split_text_at
            documents = _documents_in(decoded(itertools.chain([head], blocks(raw)), encoding), separator)
            number, text = 0, ""
            for number, text, is_first, is_last in documents:
                if is_first and is_last and (not text or text.isspace()):
                    yield SkippedRecord("empty", at)
                else:
                    yield DocumentPiece(text, number, is_first, is_last)
            if separator and number == 0 and text and not text.endswith(separator):
                yield Note(f"text files without split_text_at={separator!r} in them are one document each", at)
        except NotTextError as problem:
            if slice_.file.named:
                raise UnreadableFile(f"{path} is {problem}; {problem.way_out}") from problem
            yield SkippedRecord(problem.kind, at)


def _documents_in(blocks: Iterator[str], separator: str) -> Iterator[tuple[int, str, bool, bool]]:
    """Yield (document's number, piece, is it the document's first, its last).

    The pieces are those that cut() makes of each document, wherever the blocks end.
    """
    number, buffer, is_first = 0, "", True
    for block in itertools.chain(filter(None, blocks), [""]):
        at_end, buffer, at = not block, buffer + block, 0
        # take a document, or a piece of a longer one, while the buffer is sure to contain all of it
        while True:
            found = buffer.find(separator, at) if separator else -1
            if found >= 0:
                end = found + len(separator)
                *early, last = cut(buffer[at:end], PIECE_CHARACTERS)
            elif len(buffer) - at > PIECE_CHARACTERS + len(separator):
                end = at + cut_at(buffer, at, PIECE_CHARACTERS)
                early, last = [buffer[at:end]], None
            elif at_end and (at < len(buffer) or number == 0):
                end = len(buffer)
                *early, last = cut(buffer[at:], PIECE_CHARACTERS)
            else:
                break
            at = end
            for piece in early:
                yield number, piece, is_first, False
                is_first = False
            if last is not None:
                yield number, last, is_first, True
                number, is_first = number + 1, True
        buffer = buffer[at:]
