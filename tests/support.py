"""What several test files share: a synthetic corpus, run files of it, and ways to start real ranks."""

import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.report import plots
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.distributed.collectives import gather_objects
from megagpt.distributed.process_group import is_main, leave
from megagpt.distributed.rank_variables import without_launcher
from megagpt.model.loss import next_token_score

if TYPE_CHECKING:
    from megagpt.engine.build import Engine  # which imports DeepSpeed: programs that start often need none

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "programs"  # what tests start in processes of their own
DEBUG_RUN = ROOT / "ds_configs" / "debug_cpu.json"
RUN_FILES = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if "megagpt" in json.loads(path.read_text()))
GOOD = {  # a run file that nothing is wrong with
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "megagpt": {
        "out_dir": "runs/x",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32},
        "data": {"train": [{"path": "d"}], "val": "d"},
        "schedule": {"max_steps": 5},
    },
}
SCALARS = {  # that TensorBoard shows of every run that evaluates, saves and samples
    *("train/loss", "val/loss", "val/best_loss", "val/perplexity", "val/bits_per_byte"),
    *("optim/lr", "optim/grad_norm", "optim/skipped_steps", "data/epoch", "data/wait_seconds_per_step"),
    *("perf/tokens_per_sec", "perf/memory_gib", "perf/seconds_per_step"),
    *("perf/eval_seconds", "perf/save_seconds", "perf/sample_seconds"),
}

# Muon on a model whose biases are odd in length, so that stage 3 pads them on two ranks; matrices lie on both at all
# stages but 0.
MUON = [
    *("optimizer.type=Muon", "optimizer.params.muon_lr=0.01"),
    'megagpt.model={"n_layer": 2, "n_head": 5, "n_embd": 65, "seq_len": 64}',
    'megagpt.every={"log": 1, "eval": 0, "save": 0}',
]
EMA = "megagpt.ema.decay=0.9"


# Runs of eight steps that a sample's positions may be shared in: every ZeRO stage, and all that makes ranks unlike.
_FEW = ["megagpt.schedule.max_steps=8", "megagpt.every.eval=4", "train_micro_batch_size_per_gpu=2"]
OTHER_BLOCKS = [
    "megagpt.model.preset=llama",
    "megagpt.model.n_kv_head=1",
    "megagpt.model.qk_norm=true",
    "megagpt.model.logit_softcap=5",
    "megagpt.model.value_residual=true",
    "megagpt.model.embedding_shortcut=true",
    "megagpt.model.sliding_window=20",
    "megagpt.model.sliding_window_pattern=2",
]
LR_SCALE = 'optimizer.params.lr_scale={"embeddings": 2, "vectors": 0.5}'
SHARING = {
    "stage0": [*_FEW, "zero_optimization.stage=0", 'megagpt.regularization={"label_smoothing": 0.1, "z_loss": 0.001}'],
    "stage1": [*_FEW, "zero_optimization.stage=1", "megagpt.packing.kind=best-fit", "megagpt.augment.goldfish.k=3"],
    "stage2": [*_FEW, "zero_optimization.stage=2", "megagpt.packing.kind=concatenate-masked"],
    "stage3": [*_FEW, "zero_optimization.stage=3", "megagpt.recompute.policy=full", "megagpt.data.seq_len=48"],
    "other blocks": [
        *(*_FEW, "zero_optimization.stage=1", "megagpt.packing.kind=concatenate-masked", *OTHER_BLOCKS),
        "megagpt.regularization.stochastic_depth=0.4",  # which one rank and two draw alike
    ],
}


def write_corpus(path: Path, n_documents: int, *, seed: int = 0) -> Path:
    """JSON lines of random sentences over 60 made-up words: the same on every machine, and learnable."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(2, 7))) for _ in range(60)]
    with path.open("w") as file:
        for _ in range(n_documents):
            sentences = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(rng.randint(3, 9))]
            file.write(json.dumps({"text": ".\n".join(sentences)}) + "\n")
    return path


def build_dataset(folder: Path, *, n_documents: int = 400, val_fraction: float = 0.2, seed: int = 0) -> Path:
    """A char-level dataset: its tokenizer depends on nothing that could differ between versions."""
    corpus = write_corpus(folder.with_suffix(".jsonl"), n_documents, seed=seed)
    options = BuildConfig(tokenizer_type="char", vocab_size=300, val_fraction=val_fraction, workers=1)
    build([corpus], folder, options)
    return folder


def build_noise(folder: Path) -> Path:
    """A few documents of random letters: there is nothing to learn beyond ln(8), so a model can only memorize."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=100)) for _ in range(12)]
    corpus = folder.with_suffix(".jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build([corpus], folder, BuildConfig(tokenizer_type="char", vocab_size=300, val_fraction=0.4, workers=1))
    return folder


def overrides(dataset: Path, out_dir: Path, *more: str) -> list[str]:
    return [
        f"megagpt.data.train.0.path={dataset}",
        f"megagpt.data.val={dataset}",
        f"megagpt.out_dir={out_dir}",
        "megagpt.sample.max_tokens=8",  # generated a token at a time, 128 would take longer than training
        *more,
    ]


def debug_run(dataset: Path, out_dir: Path, *more: str) -> RunConfig:
    """The debug run file on another dataset."""
    return load_run_config(DEBUG_RUN, overrides(dataset, out_dir, *more))


def metric(out_dir: Path, name: str) -> dict[int, float]:
    """step -> value, from metrics.jsonl; a step that was written twice fails."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    values = [(row["step"], row[name]) for row in rows if name in row]
    assert len(values) == len(dict(values)), f"{name} has a step twice"
    return dict(values)


def curves(out_dir: Path) -> dict[str, dict[int, float]]:
    """Every metric: name -> step -> value."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        name: metric(out_dir, name) for name in {name for row in rows for name in row} - {"step", "tokens_seen", "time"}
    }


@contextmanager
def held_up(pid: int) -> Iterator[None]:
    """A process is stopped for four fifths of the time, as one whose processor is throttled."""
    over = threading.Event()

    def pulse() -> None:
        while not over.wait(0.001):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.004)
            os.kill(pid, signal.SIGCONT)

    pulses = threading.Thread(target=pulse)
    pulses.start()
    try:
        yield
    finally:
        over.set()
        pulses.join()


def free_port() -> int:
    """A port that nobody listens on, below the kernel's ephemeral ones, where no client's end can come to lie."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def environment() -> dict[str, str]:
    """The test's own, without what would make a child think that a launcher started it."""
    kept = without_launcher(os.environ)
    path = [str(ROOT), str(ROOT / "tests"), str(PROGRAMS), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path)}


def torchrun(n_ranks: int, *args: str | Path, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    return subprocess.run(
        [*command, *map(str, args)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def scenarios(program: str, dataset: Path, folder: Path, *, ranks: int = 2) -> dict[str, list[Any]]:
    """Run every scenario of tests/programs/PROGRAM in one launch: name -> what each rank returned."""
    done = torchrun(ranks, PROGRAMS / program, dataset, folder, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, list[Any]] = read_json(folder / "results.json")
    return found


DRAW_SVG = plots._svg


def leave_plots_blank() -> None:
    """From here on the page of a build has blank plots: seven of them take longer than the rest of a small build.

    data_tools/test_report.py draws them.
    """
    plots._svg = lambda *args, **kw: '<svg role="img"></svg>'


def leave_old_objects_alone() -> None:
    """From here on gc.collect() looks at young objects only.

    Each run collects once, and all that torch and DeepSpeed have imported makes that half of a short run's time.
    """
    collect = gc.collect
    gc.collect = lambda generation=2: collect(min(generation, 1))


def leave_writes_in_memory() -> None:
    """From here on os.fsync() returns at once: a test waits for the disk a hundred times, and none cuts the power.

    Programs that tests start do wait. checkpoint/test_rotation.py shows what is on the disk before what.
    """
    os.fsync = lambda fd: None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def run_scenarios(scenarios: Sequence[Callable[[Path, Path], Any]]) -> None:
    """The main program of one of several ranks: DATASET FOLDER; folder/results.json has what each rank returned."""
    dataset, folder = map(Path, sys.argv[1:])
    leave_old_objects_alone()
    results = {}
    for scenario in scenarios:
        print(f"=== {scenario.__name__}", flush=True)
        results[scenario.__name__] = gather_objects(scenario(dataset, folder / scenario.__name__))
    if is_main():
        (folder / "results.json").write_text(json.dumps(results))
    leave()


VOCAB = 128  # of models that take steps without a dataset


def batch_of(step: int) -> Tensor:
    """The four samples of 16 tokens and a next one that a step of `take_steps` sees."""
    return torch.randint(0, VOCAB, (4, 17), generator=torch.Generator().manual_seed(step))


def take_steps(engine: "Engine", *steps: int) -> "Engine":
    """Pass each step's batch through an engine: an update, where that is its whole batch."""
    for step in steps:
        engine.backward(engine(batch_of(step)[:, :-1], score=next_token_score(batch_of(step)[:, 1:])))
        engine.step()
    return engine
