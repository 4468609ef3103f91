"""Text files: a whole one is a document, or what ends in each separator is."""

import itertools
from collections.abc import Iterator
from functools import partial

from data_tools.config import SourceConfig
from data_tools.readers.document_pieces import PIECE, Items, Piece, Skipped, cut, cut_at
from data_tools.readers.encodings import BLOCK, NotTextError, blocks, decoded, encoding_of
from data_tools.readers.open_file import open_bytes
from data_tools.readers.work_units import Slice
from megagpt.errors import UserError


def read_text(part: Slice, source: SourceConfig) -> Items:
    path, at = part.file.path, partial(str, part.file.path)
    with open_bytes(part.file) as raw:
        head = raw.read(BLOCK)
        try:
            encoding = encoding_of(head, source.encoding)
            documents = _documents_in(decoded(itertools.chain([head], blocks(raw)), encoding), source.split_text_at)
            for number, text, is_first, is_last in documents:
                if is_first and is_last and (not text or text.isspace()):
                    yield Skipped("empty", at)
                else:
                    yield Piece(text, number, is_first, is_last)
        except NotTextError as problem:
            if part.file.named:
                raise UserError(f"{path} is {problem}; {problem.way_out}") from problem
            yield Skipped(problem.kind, at)


def _documents_in(blocks: Iterator[str], separator: str) -> Iterator[tuple[int, str, bool, bool]]:
    """(number, piece, is its document's first, last): the whole text, or what ends in each separator, as pieces.

    The same pieces as cut() makes of each document, wherever the blocks end.
    """
    number, buffer, is_first = 0, "", True
    for block in itertools.chain(filter(None, blocks), [""]):
        at_end, buffer, at = not block, buffer + block, 0
        while True:
            found = buffer.find(separator, at) if separator else -1
            if found >= 0:
                end = found + len(separator)
                *early, last = cut(buffer[at:end], PIECE)
            elif len(buffer) - at > PIECE + len(separator):
                end = at + cut_at(buffer, at, PIECE)
                early, last = [buffer[at:end]], None
            elif at_end and (at < len(buffer) or number == 0):
                end = len(buffer)
                *early, last = cut(buffer[at:], PIECE)
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
