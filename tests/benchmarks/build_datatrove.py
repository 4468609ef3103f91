"""The other side of build.py: JSON lines to tokens with datatrove's formatters, filters and document tokenizer.

    build_datatrove.py RULES MODEL.json CORPUS OUT      RULES as build.py names them

Runs in a Python with `datatrove[processing]`, spaCy, orjson and tokenizers, without its executor, in one process.
"""

import sys
from pathlib import Path

from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

PUBLISHED = (GopherQualityFilter, GopherRepetitionFilter, C4QualityFilter, FineWebQualityFilter)


def none_rejects() -> list:
    """As build.py loosens ours: every value is still computed, and the limits let all documents pass."""
    return [
        GopherQualityFilter(
            min_doc_words=0,
            min_avg_word_length=0,
            max_avg_word_length=10**6,
            max_symbol_word_ratio=9.0,
            max_bullet_lines_ratio=1.0,
            max_ellipsis_lines_ratio=1.0,
            max_non_alpha_words_ratio=0.0,
            min_stop_words=0,
        ),
        GopherRepetitionFilter(
            dup_line_frac=1.0,
            dup_line_char_frac=1.0,
            dup_para_frac=1.0,
            dup_para_char_frac=1.0,
            top_n_grams=((2, 9.0), (3, 9.0), (4, 9.0)),
            dup_n_grams=tuple((n, 1.0) for n in range(5, 11)),
        ),
        C4QualityFilter(filter_no_terminal_punct=False, min_num_sentences=0, filter_curly_bracket=False),
        FineWebQualityFilter(line_punct_thr=0.0, short_line_thr=1.0, char_duplicates_ratio=1.0, new_line_ratio=9.0),
    ]


def main(rules: str, model: str, corpus: Path, out: str) -> None:
    filters = none_rejects() if rules == "every rule, none rejects" else [each() for each in PUBLISHED]
    steps = [
        FTFYFormatter(),
        PIIFormatter(),
        *filters,
        DocumentTokenizer(out, model, eos_token="</s>", shuffle_documents=True),
    ]
    documents = JsonlReader(str(corpus.parent), glob_pattern=corpus.name).run()
    for step in steps:
        documents = step.run(documents, rank=0, world_size=1)
    for _ in documents or ():
        pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
