"""Megabytes tokenized per second by a Hugging Face tokenizer.json: ours, and the `tokenizers` package's own batches.

    python tests/benchmarks/tokenizing.py --mb 30 --json tokenizing_cpu.json

Text: the files of Python's standard library, each once, up to --mb (about 30 MB; with what is installed there, more), a
document for each. The tokenizer: a byte-level BPE with GPT-2's pattern and 32,000 tokens, trained on the first 5 MB by
`tokenizers`. Both sides take turns, each round once; the ids of 200 files are compared. The package uses as many
threads as it does by itself.
"""

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import tokenizers
from throughput_table import commit, hardware
from tokenizers import decoders, models, pre_tokenizers, trainers

from megagpt.tokenizer.tokenizer import Tokenizer


def texts_of(n_bytes: int) -> list[str]:
    """Different texts: repeated ones would flatter whoever remembers what it has seen."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        found.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(found[-1].encode())
        if size >= n_bytes:
            break
    return found


def train(texts: list[str], path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = texts_of(args.mb * 10**6)
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        train(texts_of(5 * 10**6), path)
        own = tokenizers.Tokenizer.from_file(str(path))
        times: dict[str, list[float]] = {"megagpt": [], "tokenizers": []}
        for _ in range(args.rounds):
            ours = Tokenizer.load(path)  # anew: it remembers the segments that it has seen
            times["megagpt"].append(seconds(lambda ours=ours: ours.encode_batch(texts)))
            times["tokenizers"].append(seconds(lambda: own.encode_batch(texts, add_special_tokens=False)))
        some = texts[:200]
        expected = [encoding.ids for encoding in own.encode_batch(some, add_special_tokens=False)]
        assert [ids.tolist() for ids in Tokenizer.load(path).encode_batch(some)] == expected
    rates = {name: [size / spent for spent in of] for name, of in times.items()}
    ratios = [one / other for one, other in zip(*rates.values(), strict=True)]
    for name, of in rates.items():
        print(f"{name}: {statistics.median(of):.1f} MB/s ({min(of):.1f} to {max(of):.1f})")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if args.json:
        facts = {"date": str(date.today()), "commit": commit(), "tokenizers": version("tokenizers"), **hardware("cpu")}
        args.json.write_text(json.dumps(facts | {"mb": size, "rates": rates, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
