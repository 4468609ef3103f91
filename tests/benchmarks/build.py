"""JSON lines to shards: megabytes per core-second with each option, and ratios against other builders.

    python tests/benchmarks/build.py --model tokenizer.model --datatrove PYTHON --out build.json

Every contestant is a process of its own that reads the same file, tokenizes it with the same unigram model and writes
the ids. Its time is the processor's, from the start of its interpreter to its end, with all children. All take turns
within a round; a ratio is taken within a round, and the median over rounds is printed. "MB" counts the JSON lines.

    pool         a process pool that tokenizes and hands lists of ids to one parent that writes, as Megatron-LM's
                 preprocess_data.py does: both count
    tokenizers   Hugging Face's, on the same model (its ids differ in a few documents, which are counted)
    datatrove    the same rules and Hugging Face's tokenizer; --datatrove is a Python with datatrove[processing],
                 spaCy, orjson and tokenizers
    workers      two local workers against one, by the clock, on --workers-megabytes of text

"every rule" is all repairs and masks and the rules of Gopher, C4 and FineWeb with the published thresholds, which
reject most source code; "every rule, none rejects" has thresholds that let all documents pass.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from corpus import jsonl_corpus
from rules import TURNS

HERE = Path(__file__).parent
CLEAN = TURNS["all cleaning"]
OPTIONS = {
    "no dedup": {"dedup": {"method": "none"}},
    "exact dedup": {},
    "near dedup": {"dedup": {"method": "near"}},
    "every rule": {"rules": TURNS["everything"]},
    "every rule, none rejects": {"rules": CLEAN | TURNS["all filters, none rejects"]},
    "one subword variant": {"dedup": {"method": "none"}, "subword": {"variants": 1}},
}
AGAINST = {  # other -> (ours, least ratio)
    "pool": ("no dedup", 1.5),
    "tokenizers": ("no dedup", 10.0),
    "datatrove, every rule": ("every rule", 3.0),
    "datatrove, every rule, none rejects": ("every rule, none rejects", 3.0),
}
GOAL = 14.0  # MB per core-second without deduplication


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, help="JSON lines with a text field; made of this machine's own if absent"
    )
    parser.add_argument("--megabytes", type=int, default=64, help="of the corpus that is made")
    parser.add_argument("--model", type=Path, help="a unigram model; one of 32,000 pieces is trained if absent")
    parser.add_argument("--datatrove", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="names of contestants and 'workers', separated by ';'; all if absent"
    )
    parser.add_argument("--workers-megabytes", type=int, default=256)
    parser.add_argument("--out", type=Path, help="raw figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, model = args.corpus or folder / "corpus.jsonl", args.model or folder / "unigram.model"
        if not args.corpus:
            jsonl_corpus(corpus, args.megabytes * 10**6, seed=1234)
        if not args.model:
            data_tools("train-tokenizer", corpus, model, {"vocab_size": 32000})
        subprocess.run([sys.executable, HERE / "build_others.py", "convert", model, folder / "model.json"], check=True)
        contestants = all_contestants(corpus, model, folder, args.datatrove)
        wanted = [name for name in contestants if not args.only or name in args.only.split(";")]
        print(f"{corpus.stat().st_size / 1e6:.1f} MB of JSON lines, load of the machine {os.getloadavg()[0]:.1f}")
        rounds = take_turns({name: contestants[name] for name in wanted}, args.rounds, folder)
        if rounds:
            show(rounds, corpus.stat().st_size / 1e6)
        if "tokenizers" in wanted:
            count = [sys.executable, HERE / "build_others.py", "compare", model, folder / "model.json", corpus]
            subprocess.run(list(map(str, count)), check=True)
        clock = []
        if not args.only or "workers" in args.only.split(";"):
            jsonl_corpus(folder / "large.jsonl", args.workers_megabytes * 10**6, seed=1234)
            clock = compare_workers(folder / "large.jsonl", model, folder, args.rounds)
        if args.out:
            args.out.write_text(json.dumps({"core_seconds": rounds, "workers_1_2_seconds": clock}, indent=1) + "\n")


def all_contestants(corpus: Path, model: Path, folder: Path, datatrove: str | None) -> dict[str, Callable[[], None]]:
    """What each one runs, in the order of a round: ours and its rivals one after the other."""
    out = folder / "out"

    def ours(options: dict) -> Callable[[], None]:
        return lambda: data_tools("build", corpus, out, options | {"tokenizer": str(model), "workers": 1})

    def other(python: str, script: str, *args: str | Path) -> Callable[[], None]:
        return lambda: run(python, HERE / script, *args)

    found = {name: ours(options) for name, options in OPTIONS.items()}
    found["pool"] = other(sys.executable, "build_others.py", "pool", model, corpus, out)
    found["tokenizers"] = other(sys.executable, "build_others.py", "tokenizers", folder / "model.json", corpus, out)
    if datatrove:
        for rules in ("every rule", "every rule, none rejects"):
            found[f"datatrove, {rules}"] = other(
                datatrove, "build_datatrove.py", rules, folder / "model.json", corpus, out
            )
    order = ["no dedup", "pool", "tokenizers", "exact dedup", "near dedup", "one subword variant"]
    return {name: found[name] for name in order + [name for name in found if name not in order]}


def data_tools(command: str, corpus: Path, out: Path, options: dict) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(options, config)
        config.flush()
        run(sys.executable, "-m", "data_tools", command, "--input", corpus, "--out", out, "--config", config.name)


def run(*command: str | Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")


def take_turns(contestants: dict[str, Callable[[], None]], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Core-seconds of each contestant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            begin = os.times()
            work()
            end = os.times()
            seconds[name].append(end.children_user + end.children_system - begin.children_user - begin.children_system)
            clear(folder / "out")
    return seconds


def clear(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)


def show(seconds: dict[str, list[float]], megabytes: float) -> None:
    print(f"{'':36} MB per core-second: median (min to max)")
    for name, found in seconds.items():
        speeds = [megabytes / each for each in found]
        goal = f"   goal {GOAL:g}" if name == "no dedup" else ""
        print(f"{name:36} {statistics.median(speeds):7.2f} ({min(speeds):.2f} to {max(speeds):.2f}){goal}")
    for other, (ours, goal) in AGAINST.items():
        if {other, ours} <= seconds.keys():
            ratios = [theirs / mine for theirs, mine in zip(seconds[other], seconds[ours], strict=True)]
            print(f"{ours} / {other}: {spread(ratios)}, goal {goal:g}")
    if {"no dedup", "one subword variant"} <= seconds.keys():
        extra = [more - less for more, less in zip(seconds["one subword variant"], seconds["no dedup"], strict=True)]
        print(f"the variant alone: {spread([megabytes / each for each in extra])} MB per core-second")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def compare_workers(corpus: Path, model: Path, folder: Path, rounds: int) -> list[list[float]]:
    """Seconds by the clock with one worker and with two, in each round."""
    clock: list[list[float]] = []
    for _ in range(rounds):
        clock.append([])
        for workers in (1, 2):
            begin = time.monotonic()
            data_tools("build", corpus, folder / "out", {"tokenizer": str(model), "workers": workers})
            clock[-1].append(time.monotonic() - begin)
            clear(folder / "out")
    ratios = spread([one / two for one, two in clock])
    print(f"two workers against one, by the clock, {corpus.stat().st_size / 1e6:.0f} MB: {ratios}, goal 1.7")
    return clock


if __name__ == "__main__":
    main()
