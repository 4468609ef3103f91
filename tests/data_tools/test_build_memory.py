"""The memory of a build does not grow with its input: measured by the kernel on real processes."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_support import document, small_tokenizer
from support import ROOT

from data_tools.stages.tokenize import FILE_TOKENS

MB = 1_000_000


def one_line(path: Path, n_bytes: int) -> None:
    """A text of words without a newline."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    with path.open("w") as file:
        while file.tell() < n_bytes:
            file.write(" ".join(rng.choices(words, k=100_000)) + " ")


def many_lines(path: Path, n_bytes: int) -> None:
    texts = [json.dumps(document(i, n_words=600))[1:-1] for i in range(500)]
    with path.open("w") as file:
        n = 0
        while file.tell() < n_bytes:
            file.writelines(f'{{"text": "{n}.{i} {text}"}}\n' for i, text in enumerate(texts))
            n += 1


def peak_megabytes(
    write: Callable[[Path, int], None], n_bytes: int, folder: Path, *options: str, part_tokens: int = FILE_TOKENS
) -> float:
    """The largest resident memory of the build's process and its workers, memory-mapped pages included."""
    path = folder / ("a.jsonl" if write is many_lines else "a.txt")
    folder.mkdir()
    write(path, n_bytes)
    (folder / "small.model").write_bytes(small_tokenizer().model_bytes)
    script = (
        "import resource, sys, data_tools.stages.tokenize as t; from data_tools.__main__ import main; "
        f"t.FILE_TOKENS = {part_tokens}; code = main(); "
        "kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN; "
        "print(max(resource.getrusage(kind).ru_maxrss for kind in kinds)); sys.exit(code)"
    )
    arguments = ["build", "--input", str(path), "--out", str(folder / "out"), f"tokenizer={folder / 'small.model'}"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "val_fraction=0", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path.unlink()
    return int(done.stdout.splitlines()[-1]) * 1024 / MB


@pytest.mark.process
def test_a_longer_line_takes_no_more_memory_than_the_map_of_its_tokens(tmp_path: Path) -> None:
    """Its tokens (16 bits each, at most one per byte) are mapped when shards are written; nothing else grows.

    A text in memory as a whole would also take its bytes, its characters, its pieces and its ids.
    """
    short = peak_megabytes(one_line, 20 * MB, tmp_path / "short", "workers=1", part_tokens=2**20)
    long = peak_megabytes(one_line, 70 * MB, tmp_path / "long", "workers=1", part_tokens=2**20)
    assert long - short < 2.5 * 50  # 2 for the map, the rest for what allocators keep


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize(
    ("write", "n_bytes"), [(one_line, 1000 * MB), (many_lines, 4000 * MB)], ids=["1 GB line", "4 GB of JSON lines"]
)
def test_a_build_takes_at_most_1500_megabytes_for_each_worker(
    write: Callable[[Path, int], None], n_bytes: int, tmp_path: Path
) -> None:
    assert (
        peak_megabytes(write, n_bytes, tmp_path / "build", "workers=2", "dedup.method=near", "rules.clean=true") < 1500
    )
