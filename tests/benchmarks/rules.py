"""How fast documents are cleaned and judged, in MB of UTF-8 per second of one core (process time).

Each rule alone, then everything at once; the best of several turns. With `--datatrove PYTHON` (a Python that has
`datatrove[processing]` and spaCy) its filters judge the same documents, turn by turn with ours: the ratio of speeds
and how many verdicts agree. The documents are pieces of about 4 kB of the text files in the folders given, drawn in a
fixed order.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data_tools.filters.rules import RulesConfig, apply_rules

REPAIRS = {"newlines": True, "mojibake": True, "control_characters": True, "zero_width": True, "nfc": True}
MASKS = {"emails": True, "public_ips": True}
RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
TURNS = {
    "nothing": {},
    "mojibake": {"clean": {"mojibake": True}},
    "masks": {"clean": MASKS},
    "all cleaning": {"clean": REPAIRS | MASKS | {"policy_lines": True}},
    **{rule: {rule: True} for rule in RULES},
    "all filters, none rejects": {
        "gopher_quality": {
            "min_words": 0,
            "min_mean_word_length": 0.0,
            "max_mean_word_length": 1e6,
            "max_bullet_lines": 1.0,
            "max_ellipsis_lines": 1.0,
            "min_alphabetic_words": 0.0,
            "min_stop_words": 0,
            "max_symbols_per_word": 9.0,
        },
        "gopher_repetition": {
            "max_duplicate_lines": 1.0,
            "max_duplicate_line_characters": 1.0,
            "max_duplicate_paragraphs": 1.0,
            "max_duplicate_paragraph_characters": 1.0,
            "max_top_ngrams": [[2, 9.0], [3, 9.0], [4, 9.0]],
            "max_duplicate_ngrams": [[n, 1.0] for n in range(5, 11)],
        },
        "c4": {"end_punctuation": False, "min_sentences": 0, "curly_brackets": False},
        "fineweb": {
            "min_punctuated_lines": 0.0,
            "max_short_lines": 1.0,
            "max_duplicate_line_characters": 1.0,
            "max_newlines_per_word": 9.0,
        },
    },
    "everything": {"clean": REPAIRS | MASKS | {"policy_lines": True}, **dict.fromkeys(RULES, True)},
}
COMPARED = {"mojibake", "masks", *RULES, "everything"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", default=[Path(sysconfig.get_path("stdlib"))])
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--datatrove", metavar="PYTHON", help="a Python with datatrove[processing] and spaCy")
    parser.add_argument("--show", type=int, default=0, help="print so many differing verdicts for each rule")
    args = parser.parse_args()

    documents = sample(args.folders, args.megabytes)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    print(f"{len(documents):,} documents, {megabytes:.1f} MB, best of {args.turns} turns")
    print("rule                       kept   MB/s" + ("   datatrove   ratio   same verdict" if args.datatrove else ""))
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "documents.json")
        corpus.write_text(json.dumps(documents))
        other = Datatrove(args.datatrove, corpus) if args.datatrove else None
        for turn, options in TURNS.items():
            cfg = RulesConfig.model_validate(options)
            seconds, their_seconds, verdicts, theirs = [], [], [], []
            for _ in range(args.turns):
                start = time.process_time()
                verdicts = [apply_rules(text, cfg).rejected_by for text in documents]
                seconds.append(time.process_time() - start)
                if other and turn in COMPARED:
                    answer = other.take(turn)
                    their_seconds.append(answer["seconds"])
                    theirs = answer["verdicts"]
            kept = sum(verdict is None for verdict in verdicts) / len(verdicts)
            line = f"{turn:25} {kept:6.1%} {megabytes / min(seconds):6.1f}"
            if theirs:
                same = [(ours is None) == (its is None) for ours, its in zip(verdicts, theirs, strict=True)]
                ratio = min(their_seconds) / min(seconds)
                line += f" {megabytes / min(their_seconds):11.2f} {ratio:7.1f} {sum(same) / len(same):14.2%}"
            print(line, flush=True)
            differing = [i for i in range(len(theirs)) if not same[i]]
            for i in random.Random(0).sample(differing, min(args.show, len(differing))):
                print(f"    document {i}: ours {verdicts[i]}, datatrove {theirs[i]}")


class Datatrove:
    """Its own process, which judges all documents once for each turn asked for."""

    def __init__(self, python: str, corpus: Path) -> None:
        script = Path(__file__).with_name("rules_datatrove.py")
        self.process = subprocess.Popen(
            [python, str(script), str(corpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def take(self, turn: str) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(turn + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("datatrove's process ended; its error is above")
        return json.loads(line)


def sample(folders: list[Path], megabytes: float, size: int = 4000) -> list[str]:
    """Pieces of about `size` characters from files drawn at random, cut after a line."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    random.Random(0).shuffle(files)
    documents, total = [], 0
    for path in files:
        for piece in _pieces(_text(path), size):
            documents.append(piece)
            total += len(piece)
            if total >= megabytes * 1e6:
                return documents
    return documents


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, ValueError):
        return ""
    return "" if "\0" in text else text


def _pieces(text: str, size: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


if __name__ == "__main__":
    main()
