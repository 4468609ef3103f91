"""The other side of rules.py: datatrove's filters on the same documents, one turn for each line on standard input.

Runs in a Python with `datatrove[processing]` and spaCy; started by rules.py. Turns are answered with JSON lines.
"""

import json
import sys
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.utils.text import split_into_parts

FORMATTERS = {"mojibake": [FTFYFormatter()], "masks": [PIIFormatter()]}
FILTERS = {
    "gopher_quality": [GopherQualityFilter()],
    "gopher_repetition": [GopherRepetitionFilter()],
    "c4": [C4QualityFilter()],
    "fineweb": [FineWebQualityFilter()],
}
ALL = "everything"


def rejected_by(text: str, turn: str) -> str | None:
    """Why the document is rejected, or None."""
    document = Document(text=text, id="")
    for name, formatters in FORMATTERS.items():
        if turn in (name, ALL):
            document.text = formatters[0].format(document.text)
    for name, filters in FILTERS.items():
        if turn in (name, ALL):
            verdict = filters[0].filter(document)
            if verdict is not True:
                return f"{name}: {verdict[1]}"
    return None


def main() -> None:
    documents = json.loads(Path(sys.argv[1]).read_bytes())
    for turn in sys.stdin:
        split_into_parts.cache_clear()
        start = time.process_time()
        verdicts = [rejected_by(text, turn.strip()) for text in documents]
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds, "verdicts": verdicts}), flush=True)


if __name__ == "__main__":
    main()
