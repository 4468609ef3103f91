"""What reading training data costs, and what opening it costs at 10^12 tokens.

Reading: tokens per core-second (process time) copied into the int64 batch that the model receives, in turns:

    ours            TrainingSet.fill, the sampler's arithmetic included: one row of T + 1 tokens per sample
    ours, recut     the same in an epoch that was begun with windows of 1,500: two or three stretches per sample
    slices          one np.memmap, opened once; slices for x and y, astype(int64), nothing else
    nanoGPT, open   the same and torch.stack of both: nanoGPT's get_batch with its np.memmap opened once
    nanoGPT         get_batch as shipped: the np.memmap opened again for every batch

over --gb of shards and a flat file of as many tokens, both in the page cache. Every peer is given its random starts for
nothing. Opening: a manifest of 10^12 tokens in 3,726 shards (sparse files) in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_support import small_tokenizer, write_dataset

from data_tools.storage.shard_writer import write_index
from megagpt.data.dataset import open_dataset
from megagpt.data.manifest import Manifest, ShardInfo, SplitInfo, TokenizerInfo, Variant, write_manifest
from megagpt.data.mixture import Mixture
from megagpt.data.shard_format import INDEX, TOKENIZER_MODEL
from megagpt.data.training_set import TrainingSet, source_of

VOCAB_SIZE = 50_304
SHARD_TOKENS, BATCH_TOKENS = 2**28, 2**24
B, T = 16, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="of shards, in units of 10^9 bytes")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batches", type=int, default=2000, help="per turn")
    parser.add_argument("--folder", type=Path, help="for the temporary files; default: the system's")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # the second process of the second part
    args = parser.parse_args()
    if args.open:
        return report_opening(args.open)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        read(Path(folder), n_documents=round(args.gb * 1e9 / 2 / 2**20), turns=args.turns, batches=args.batches)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_trillion(Path(folder) / "trillion")
        for _ in range(3):
            subprocess.run([sys.executable, __file__, "--open", str(Path(folder) / "trillion")], check=True)


def read(folder: Path, n_documents: int, *, turns: int, batches: int) -> None:
    import torch

    torch.set_num_threads(1)
    document = np.random.default_rng(0).integers(3, VOCAB_SIZE, 2**20).astype(np.uint16)
    document[-1] = small_tokenizer().eod_id
    n_shards = -(-n_documents * 2**20 // SHARD_TOKENS)
    write_dataset(
        folder / "shards",
        [document] * n_documents,
        n_shards=n_shards,
        batch_tokens=BATCH_TOKENS,
        vocab_size=VOCAB_SIZE,
    )
    with (folder / "train.bin").open("wb") as file:
        for _ in range(n_documents):
            document.tofile(file)
    readers = {
        "ours": ours(folder / "shards", begun_with=T),
        "ours, recut": ours(folder / "shards", begun_with=1500),
        "slices": memmap(folder / "train.bin", stack=False),
        "nanoGPT, open": memmap(folder / "train.bin", stack=True),
        "nanoGPT": memmap(folder / "train.bin", stack=True, reopen=True),
    }
    n_bytes = n_documents * 2**21
    print(f"{n_bytes / 1e9:.2f} GB of uint16 in {n_shards} shards; batches of {B} x {T}, {turns} turns of {batches}")
    for reader in readers.values():
        reader(n_documents * 2**20 // (B * T))  # touches the page cache and opens everything
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(turns):
        for name, reader in readers.items():
            begin = time.process_time()
            reader(batches)
            speeds[name].append(batches * B * T / (time.process_time() - begin) / 1e6)
    for name, each in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(speeds["ours"], each, strict=True))
        spread = f"{min(each):.0f} to {max(each):.0f}"
        print(f"{name:14} {statistics.median(each):6.0f} M tokens per core-second ({spread}); ours / this: {ratio:.2f}")


def ours(folder: Path, *, begun_with: int) -> Callable[[int], None]:
    dataset = open_dataset(folder)
    wanted = [(source_of(dataset), 1.0)]
    mixture = Mixture(1).continued(wanted, step=0, sample=0, seq_len=begun_with, global_batch=B)
    mixture = mixture.continued(wanted, step=1, sample=B, seq_len=T, global_batch=B)
    n_samples = wanted[0][0].n_tokens[0] // T - 1000  # of the epoch that was begun, over and over
    data, rows, at = TrainingSet(mixture, [dataset]), np.empty((B, T + 1), dtype=np.int64), B

    def run(batches: int) -> None:
        nonlocal at
        for _ in range(batches):
            data.fill(at, rows)
            at = B + (at % n_samples)

    return run


def memmap(path: Path, *, stack: bool, reopen: bool = False) -> Callable[[int], None]:
    """nanoGPT's get_batch, line by line, but for its starts, which are drawn before the clock runs."""
    import torch

    rng = np.random.default_rng(1)
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = rng.integers(0, len(data) - T, (4096, B)).tolist()

    def run(batches: int) -> None:
        tokens = data
        for i in range(batches):
            ix = starts[i % len(starts)]
            if reopen:
                tokens = np.memmap(path, dtype=np.uint16, mode="r")
            x = [torch.from_numpy((tokens[i : i + T]).astype(np.int64)) for i in ix]
            y = [torch.from_numpy((tokens[i + 1 : i + 1 + T]).astype(np.int64)) for i in ix]
            if stack:
                torch.stack(x), torch.stack(y)

    return run


def write_trillion(folder: Path) -> None:
    """A dataset of 10^12 tokens whose shards are holes: everything but the tokens is as the builder writes it."""
    tokenizer = small_tokenizer()
    folder.mkdir()
    (folder / "train/v0").mkdir(parents=True)
    (folder / TOKENIZER_MODEL).write_bytes(tokenizer.model_bytes)
    shards, rows = [], []
    for shard in range(-(-(10**12) // SHARD_TOKENS)):
        name = f"train/v0/shard-{shard:06d}.arrow"
        with (folder / name).open("wb") as file:
            file.truncate(2 * SHARD_TOKENS)
        per_batch, batches = BATCH_TOKENS // 1024, SHARD_TOKENS // BATCH_TOKENS
        shards.append(
            ShardInfo(
                path=name,
                bytes=2 * SHARD_TOKENS,
                documents=per_batch * batches,
                tokens=SHARD_TOKENS,
                batches=batches,
                sha256=f"{shard:064x}",
            )
        )
        for batch in range(batches):
            place = {"split": "train", "variant": 0, "shard": shard, "batch": batch, "row0": 0, "tok0": 0}
            sizes = {"n_rows": per_batch, "n_tokens": BATCH_TOKENS, "byte_offset": batch * 2 * BATCH_TOKENS, "xxh3": 0}
            rows.append(place | sizes)
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    variant = Variant(id=0, kind="canonical", tokens=tokens, shards=tuple(shards))
    write_manifest(
        folder,
        Manifest(
            build_id="a" * 32,
            created="2026-01-01T00:00:00+00:00",
            tool="benchmark",
            tokenizer=TokenizerInfo(
                file=TOKENIZER_MODEL,
                sha256=tokenizer.sha256,
                type=tokenizer.kind,
                vocab_size=VOCAB_SIZE,
                eod_id=tokenizer.eod_id,
                normalizer=tokenizer.normalizer,
                sample_sha256=None,
            ),
            dtype="uint16",
            splits={"train": SplitInfo(documents=documents, bytes=4 * tokens, variants=(variant,))},
            index_sha256=write_index(folder / INDEX, rows),
            report_sha256="",
            other_files={},
            sources=(),
            input_sha256="",
            pipeline={},
        ),
    )


def report_opening(folder: Path) -> None:
    """Time and memory from an imported program to the first sample's place, and to one far away."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    memory = peak_memory()
    begin = time.perf_counter()
    dataset = open_dataset(folder)
    mixture = Mixture(1).continued([(source_of(dataset), 1.0)], step=0, sample=0, seq_len=T, global_batch=B)
    data = TrainingSet(mixture, [dataset])
    sampler = data.mixture.sampler(0)
    sampler.draw(0, 1)
    seconds = time.perf_counter() - begin
    grown = peak_memory() - memory
    times = []
    apart = np.random.default_rng(0).integers(0, 10**6, 300).tolist()
    for begin_at in (0, 10**9, 10**13):
        begin = time.perf_counter()
        for sample in apart:
            sampler.draw(begin_at + sample, 1)
        times.append((time.perf_counter() - begin) / len(apart) * 1e6)
    print(
        f"10^12 tokens: opened in {seconds:.3f} s and {grown / 1e6:.1f} MB; single draws from 0, 10^9, 10^13 on: "
        + ", ".join(f"{spent:.0f} us" for spent in times)
    )


def peak_memory() -> int:
    """Bytes; not getrusage's, which a process inherits from the one that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
