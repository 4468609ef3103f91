"""What must not grow does not: step time with steps, epochs, shards and the dataset's size; memory with steps.

    OMP_NUM_THREADS=1 python tests/benchmarks/steady.py           2,000 steps of a tiny model on each of four datasets
    ... steady.py --model 10M --seq 128 --batch 2 --turn 5        the same with steps as long as those of real models
    python tests/benchmarks/steady.py --start ds_configs/x.json   from the command to the end of the first step

The datasets take turns of --turn steps, each in a process of its own: 10^6 tokens in one shard (the reference of the
ratios, which are taken within a round, and once more to show what two processes differ by), the same number in 64
shards, 10^5 tokens (an epoch ends every few turns), and 10^12 tokens in 3,726 shards, of which every one is the same
file; the manifest, the index and the sampling are those of 10^12 tokens. Seconds are CPU time of the whole process.
`--start` measures by the clock, on the model of the run file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import wide_tokenizer, write_zipf, zipf_ids
from data_support import write_dataset
from throughput import Contestant, say
from throughput_table import SIZES
from turns import Spec

from data_tools.storage.shard_writer import write_index
from megagpt.data.dataset import open_dataset
from megagpt.data.manifest import read_manifest, write_manifest
from megagpt.data.shard_format import INDEX

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 1000
FOLDERS = ("one", "many", "small", "large")
SHARD_TOKENS, N_SHARDS = 2**28, 3726  # 10^12 tokens


def write_one_file(folder: Path) -> None:
    """folder/train: 10^12 tokens by its manifest and index, all of whose shards are the first one."""
    ids = zipf_ids(np.random.default_rng(0), 2**20, VOCAB_SIZE)
    ids[-1] = 2
    options = {"batch_tokens": 2**24, "vocab_size": VOCAB_SIZE, "tokenizer": wide_tokenizer(VOCAB_SIZE)}
    path = folder / "train"
    write_dataset(path, [ids] * (SHARD_TOKENS >> 20), n_shards=1, **options)
    rows = open_dataset(path).index_rows("train")
    names = {"split": "train", "variant": 0}
    digest = write_index(path / INDEX, [row | names | {"shard": i} for i in range(N_SHARDS) for row in rows])
    manifest = read_manifest(path)
    split = manifest.splits["train"]
    one = split.variants[0]
    many = one.model_copy(update={"tokens": one.tokens * N_SHARDS, "shards": one.shards * N_SHARDS})
    split = split.model_copy(update={"documents": split.documents * N_SHARDS, "variants": (many,)})
    write_manifest(path, manifest.model_copy(update={"splits": {"train": split}, "index_sha256": digest}))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """dataset -> what its turns took, and of their seconds what waiting for data took."""
    n_layer, n_head, n_embd = SIZES[args.model]
    datasets = {
        "10^6 tokens": "one",
        "10^6 tokens in 64 shards": "many",
        "10^5 tokens": "small",
        "10^12 tokens": "large",
        "10^6 tokens once more": "one",  # what the processes alone differ by
    }
    write_zipf(folder / "one", 10**6, VOCAB_SIZE)
    write_zipf(folder / "many", 10**6, VOCAB_SIZE, n_shards=64)
    write_zipf(folder / "small", 10**5, VOCAB_SIZE)
    write_one_file(folder / "large")
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in datasets}
    with ExitStack() as stack:
        contestants = {}
        for number, (name, data) in enumerate(datasets.items()):
            spec = Spec(
                peer="ours-one-file" if data == "large" else "ours",
                overrides=[f"megagpt.data.train.0.path={folder / data / 'train'}"],
                folder=str(folder / "one"),
                name=str(number),
                model={"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "seq_len": args.seq},
                vocab_size=VOCAB_SIZE,
                micro_batch=args.batch,
                global_batch=args.batch,
                turn=args.turn,
                dtype="fp32",
                device="cpu",
            )
            contestants[name] = Contestant(spec, 1, warmup=args.turn)
            stack.callback(contestants[name].end)
        for number in range(args.rounds):
            for name, contestant in contestants.items():
                turns[name].append(contestant.take(args.turn))
            say(f"round {number + 1}/{args.rounds}")
    for number, name in enumerate(datasets):
        lines = (folder / "one" / str(number) / "metrics.jsonl").read_text().splitlines()
        waited = [json.loads(line)["data/wait_seconds_per_step"] for line in lines][1:]
        for took, seconds in zip(turns[name], waited, strict=False):
            took["data_seconds"] = seconds
    return turns


def summary(turns: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each dataset."""
    first = next(iter(turns.values()))
    rows = []
    for name, took in turns.items():
        seconds = [turn["cpu_seconds"] / turn["steps"] for turn in took]
        ratios = [turn["cpu_seconds"] / other["cpu_seconds"] for turn, other in zip(took, first, strict=True)]
        quarter = max(1, len(took) // 4)
        half = len(took) // 2
        rows.append(
            {
                "dataset": name,
                "steps": sum(turn["steps"] for turn in took),
                "cpu_ms_per_step": 1e3 * statistics.median(seconds),
                "over_the_first": statistics.median(ratios),
                "last_quarter_over_first": statistics.median(seconds[-quarter:]) / statistics.median(seconds[:quarter]),
                "resident_mib": took[-1]["resident_mib"],
                "grown_mib": took[-1]["resident_mib"] - took[0]["resident_mib"],
                "grown_mib_second_half": took[-1]["resident_mib"] - took[half]["resident_mib"],
                "live_mib_grown_second_half": took[-1]["live_mib"] - took[half]["live_mib"],
                "waiting_for_data": sum(turn.get("data_seconds", 0.0) for turn in took)
                / sum(turn["seconds"] for turn in took if "data_seconds" in turn),
            }
        )
    return rows


def first_steps(run_file: Path, overrides: list[str], times: int) -> list[float]:
    """Seconds from the command to the line that logs the first step, several times over; the first warms caches."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        write_zipf(Path(folder), 2**20, 50_257)
        data = {"train": [{"path": f"{folder}/train"}], "val": f"{folder}/val"}
        ours = [f"megagpt.data={json.dumps(data)}", f"megagpt.out_dir={folder}/run", "megagpt.every.log=1"]
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--deepspeed_config", str(run_file), "--fresh"]
        for _ in range(times):
            began = time.perf_counter()
            with subprocess.Popen([*command, *ours, *overrides], stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                if not any("| train/loss" in line for line in process.stdout):
                    sys.exit(f"{run_file} took no step")
                seconds.append(time.perf_counter() - began)
                process.kill()
            say(f"first step after {seconds[-1]:.1f} s")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--turn", type=int, default=50, help="steps")
    parser.add_argument("--start", type=Path, metavar="RUN_FILE", help="measure a start instead")
    parser.add_argument("--times", type=int, default=3, help="starts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of --start's run file")
    args = parser.parse_args()
    figures: Any
    if args.start:
        figures = {
            "run_file": str(args.start),
            "first_step_seconds": first_steps(args.start, args.overrides, args.times),
        }
        print(json.dumps(figures))
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures = summary(measure(args, Path(folder)))
        names = [
            "over the first",
            "last quarter / first",
            "resident MiB",
            "grown",
            "2nd half",
            "live, 2nd half",
            "waiting",
        ]
        print("| dataset | steps | CPU ms per step | " + " | ".join(names) + " |\n|" + "---|" * 10)
        for row in figures:
            print(
                f"| {row['dataset']} | {row['steps']:,} | {row['cpu_ms_per_step']:.2f} | {row['over_the_first']:.3f} "
                f"| {row['last_quarter_over_first']:.3f} | {row['resident_mib']:.0f} | {row['grown_mib']:.1f} "
                f"| {row['grown_mib_second_half']:.1f} "
                f"| {row['live_mib_grown_second_half']:.2f} | {row['waiting_for_data']:.2%} |"
            )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
