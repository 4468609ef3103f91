"""Every command with wrong environments, wrong folders and wrong values: cases drawn at random, run as real processes.

A case is right if its exit code is a documented one, nothing prints a traceback, a message fits on a screen, and a
refused command leaves no file behind. As a program: `python tests/fuzz/wrong_uses.py SEED N` prints what was not.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from support import DEBUG_RUN, ROOT, build_dataset, environment, write_corpus

from data_tools.config import BuildConfig
from megagpt.checkpoint.load import load_model
from megagpt.config.parsing import dotted_items
from megagpt.config.regularization import NO_DROPOUT
from megagpt.config.run_file import load_run_config
from megagpt.huggingface.fast_tokenizer import exported_json, write_tokenizer
from megagpt.huggingface.weights import config_json, renamed, write_weights

# Of docs/architecture.md: finished, a mistake, built without some files, saved and to be started again, Ctrl-C.
CODES = {0, 2, 3, 75, 130}
SCREEN = 12_000  # characters: a hundred lines
# Of address space for data: a model of absurd size is refused here, not by the kernel's killer. Every core has a thread
# in each of several pools, with its stack and its heap.
MEMORY = (8 + (os.cpu_count() or 1) / 4) * 2**30
MEGAGPT = [sys.executable, "-m", "megagpt"]
DATA_TOOLS = [sys.executable, "-m", "data_tools"]

# A word in braces is a file or folder of the world, which a case may replace by a wrong one.
COMMANDS: dict[str, list[str]] = {
    "train": [*MEGAGPT, "train", "{run_file}", "megagpt.out_dir={out}", "megagpt.data.train.0.path={dataset}"],
    "fresh": [*MEGAGPT, "train", "--fresh", "{run_file}", "megagpt.out_dir={out}"],
    "launch": [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--deepspeed_config", "{run_file}"],
    "lint": [*MEGAGPT, "lint", "{run_file}"],
    "effective": [*MEGAGPT, "lint", "--effective", "{run_file}"],
    "plan": [*MEGAGPT, "plan", "{run_file}"],
    "probe": [*MEGAGPT, "plan", "{run_file}", "--probe", "--memory", "1"],
    "init": [*MEGAGPT, "init", "{dataset}", "--cpu", "--out", "{out}.jsonc"],
    "verify-resume": [*MEGAGPT, "verify-resume", "{run_file}", "--steps", "2"],
    "slurm": [*MEGAGPT, "slurm", "{run_file}", "--dry-run"],
    "tune": [*MEGAGPT, "tune", "{run_file}", "--space", "{space}", "--study", "{out}", "--trials", "1"],
    "find-lr": [*MEGAGPT, "tune", "{run_file}", "--find-lr", "50"],
    "transfer": [*MEGAGPT, "tune", "{run_file}", "--transfer", "20", "--study", "{out}"],
    "doctor": [*MEGAGPT, "doctor", "{run_file}"],
    "check-hosts": [*MEGAGPT, "check-hosts", "{hosts}"],
    "checkpoints": [*MEGAGPT, "checkpoints", "{run}", "--verify"],
    "generate": [*MEGAGPT, "generate", "{run}", "--max-tokens", "3"],
    "evaluate": [*MEGAGPT, "evaluate", "{run}", "--data", "{dataset}", "--tokens", "64"],
    "export": [*MEGAGPT, "export", "{run}", "{out}"],
    "import": [*MEGAGPT, "import", "{model}", "{out}"],
    "average": [*MEGAGPT, "average", "{run}", "{step}", "{out}", "--tokens", "64"],
    "report": [*MEGAGPT, "report", "{run}", "--out", "{out}.html"],
    "samples": [*MEGAGPT, "train", "{run_file}", "megagpt.data.train.0.path={dataset}", "--sample-report", "3"],
    "build": [*DATA_TOOLS, "build", "--input", "{text}", "--out", "{out}", "vocab_size=300", "workers=1"],
    "splits": [
        *(*DATA_TOOLS, "build", "--input", "{text}", "--val", "{held_out}", "--test", "{held_out}", "--strict"),
        *("--out", "{out}", "vocab_size=300", "workers=1"),
    ],
    "data": [*MEGAGPT, "data", "verify", "{dataset}"],
    "compare-tokenizers": [
        *(*DATA_TOOLS, "compare-tokenizers", "--input", "{text}", "--types", "unigram", "--steps", "0"),
        *("vocab_size=300", "workers=1"),
    ],
    "train-tokenizer": [*DATA_TOOLS, "train-tokenizer", "--input", "{text}", "--out", "{out}", "vocab_size=300"],
    "verify": [*DATA_TOOLS, "verify", "{dataset}"],
    "inspect": [*DATA_TOOLS, "inspect", "{dataset}", "--documents", "1"],
    "inspect run": [*DATA_TOOLS, "inspect", "{run}", "--step", "1"],
}
OPTIONS = {  # command -> options that take a value
    "plan": [
        "--ranks",
        "--gpu",
        "--gpu-memory",
        "--tflops",
        "--network",
        "--gpus-per-host",
        "--tokens",
        "--efficiency",
    ],
    "probe": ["--memory", "--ranks"],
    "init": ["--gpu", "--gpu-memory", "--tflops", "--hours"],
    "verify-resume": ["--then", "--then-ranks", "--steps"],
    "lint": ["--ranks"],
    "tune": ["--trials", "--time-limit", "--parallel", "--hostfile", "--seed"],
    "find-lr": ["--find-lr"],
    "transfer": ["--transfer"],
    "slurm": ["--nodes", "--gpus-per-node", "--time", "--partition", "--sbatch", "--sweep", "--container"],
    "generate": [
        *("--prompt", "--prompts", "--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p"),
        *("--repetition-penalty", "--stop", "--batch", "--seed"),
    ],
    "export": ["--dtype", "--license"],
    "evaluate": ["--split", "--tokens", "--micro-batch"],
    "average": ["--split", "--tokens", "--micro-batch", "--data", "--weights"],
    "samples": ["--sample-report"],
    "build": ["--config", "--scheduler"],
    "splits": ["--val", "--test", "--config"],
    "compare-tokenizers": ["--types", "--tokenizer", "--steps", "--config"],
    "train-tokenizer": ["--config"],
    "inspect": ["--split", "--documents", "--sample"],
    "inspect run": ["--sample", "--step"],
    "doctor": ["--hostfile"],
}
VALUES = [
    *("", "0", "-1", "1", "0.5", "2.5", "nan", "-inf", "1e-39", "1e400", "1e20", "99999999999999999999999", "٣"),
    *(
        "true",
        "null",
        "[]",
        "{}",
        '""',
        '"x"',
        "x",
        "a b",
        "\\n",
        "~",
        "$HOME",
        "../..",
        "/dev/null",
        "{}[",
        "'",
        "\u00e9",
    ),
]
ENVIRONMENTS: list[dict[str, str | None]] = [
    {"HOME": None},
    {"HOME": "/nonexistent/home"},
    {"TMPDIR": "/nonexistent/tmp"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"TZ": "Nowhere/Land"},
    {"COLUMNS": "1", "TERM": "dumb"},
    {"USER": None, "LOGNAME": None},
    {"OMP_NUM_THREADS": "0"},
    {"XDG_CACHE_HOME": "/proc"},
    {"WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "1"},
    {"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"},
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
    {"LOCAL_RANK": "7"},
    {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2"},
    {"SLURM_RESTART_COUNT": "1"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    {"TORCHELASTIC_RESTART_COUNT": "x"},
]


def missing(folder: Path) -> str:
    return str(folder / "missing")


def empty_folder(folder: Path) -> str:
    (folder / "empty").mkdir(exist_ok=True)
    return str(folder / "empty")


def file_of(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


def loop_of_links(folder: Path) -> str:
    if not (folder / "loop").is_symlink():
        (folder / "loop").symlink_to(folder / "loop")
    return str(folder / "loop")


WRONG_PATHS: list[Callable[[Path], str]] = [
    missing,
    empty_folder,
    loop_of_links,
    file_of("empty.json", b""),
    file_of("list.json", b"[1, 2]"),
    file_of("number.json", b"1e999"),
    file_of("object.json", b"{}"),
    file_of("binary", bytes(range(256)) * 40),
    file_of("two\nlines.txt", b"text\n"),
    file_of("it's a name.txt", b"text\n"),
    lambda _: "",
    lambda _: ".",
    lambda _: "/dev/null",
    lambda _: "~nobody-of-this-name/x",
    lambda _: "$NOT_SET_ANYWHERE/x",
    lambda _: "n" * 300,
    lambda _: "\udcff",
    lambda _: "s3:/bucket/key",
    lambda _: "file:///nonexistent/x",
]


@dataclass(frozen=True)
class Case:
    """One command as typed, and what is wrong with it."""

    name: str
    arguments: list[str]
    environment: dict[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        return json.dumps({"command": self.name, "arguments": self.arguments[1:], "environment": self.environment})


def world(folder: Path) -> dict[str, str]:
    """Make what the commands use: a text, a dataset, a run with a checkpoint, a run file, a hostfile."""
    dataset = build_dataset(folder / "dataset", n_documents=80)
    few = {"megagpt.schedule.max_steps": 4, "megagpt.every.save": 2, "megagpt.sample.max_tokens": 4}
    named = {"megagpt.data.train.0.path": str(dataset), "megagpt.data.val": str(dataset)}
    run = {**few, **named, "megagpt.out_dir": str(folder / "run")}
    run_file = folder / "run.json"
    raw = load_run_config(DEBUG_RUN, [f"{key}={value}" for key, value in run.items()]).as_json()
    run_file.write_text(json.dumps(raw))
    command = [*MEGAGPT, "train", str(run_file)]
    started = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, check=False)
    assert started.returncode == 0, started.stderr
    (folder / "hosts").write_text("localhost slots=1\n")
    write_model(folder / "run", folder / "model")
    text = write_corpus(folder / "text.jsonl", 60)
    held_out = write_corpus(folder / "held_out.jsonl", 10, seed=1)
    (folder / "space.json").write_text('{"optimizer.params.lr": {"low": 1e-4, "high": 1e-2, "log": true}}')
    paths = {"dataset": dataset, "run": folder / "run", "run_file": run_file, "hosts": folder / "hosts"}
    paths["space"] = folder / "space.json"
    paths |= {"step": folder / "run" / "checkpoints" / "step_00000002", "model": folder / "model"}
    paths |= {"text": text, "held_out": held_out}
    return {name: str(path) for name, path in paths.items()}


def write_model(run: Path, folder: Path) -> None:
    """Write a run's model as a Hugging Face folder, as `megagpt export` does but for the check of it."""
    model, tokenizer, *_ = load_model(run, torch.device("cpu"))
    folder.mkdir()
    write_weights(renamed(model.state_dict(), model.cfg, tokenizer.vocab_size), folder, torch.float32)
    config = config_json(model.cfg, tokenizer.vocab_size, tokenizer.eod_id, NO_DROPOUT, "fp32")
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(exported_json(tokenizer), tokenizer, model.cfg.seq_len, folder)


def draw(rng: random.Random, whole: dict[str, str], folder: Path) -> Case:
    """Draw a command and one to three things that are wrong with it."""
    name = rng.choice(list(COMMANDS))
    places = {**whole, "out": str(folder / "out")}
    variables: dict[str, str | None] = {}
    more: list[str] = []
    for _ in range(rng.randint(1, 3)):
        match rng.choice(["environment", "path", "value", "key"]):
            case "environment":
                variables |= rng.choice(ENVIRONMENTS)
            case "path":
                used = [place for place in places if any(f"{{{place}}}" in word for word in COMMANDS[name])]
                places[rng.choice(used)] = rng.choice(WRONG_PATHS)(folder)
            case "value" if name in OPTIONS:
                more += [rng.choice(OPTIONS[name]), rng.choice(VALUES)]
            case _:
                more.append(f"{rng.choice(KEYS[DATA_TOOLS[2] in COMMANDS[name]])}={rng.choice(VALUES)}")
    if name == "launch":  # else it would resume the world's own run
        more.insert(0, f"megagpt.out_dir={places['out']}")
    return Case(name, [*filled(COMMANDS[name], places), *more], variables)


def filled(words: list[str], places: dict[str, str]) -> Iterator[str]:
    for word in words:
        for place, path in places.items():
            word = word.replace(f"{{{place}}}", path)
        yield word


_RUN_KEYS = [key for key, _ in dotted_items(json.loads(DEBUG_RUN.read_text()))]
KEYS = {
    False: [*_RUN_KEYS, "max_steps", "lr", "megagpt", "megagpt.model", "optimizer", "megagpt.sample.temperature"],
    True: [*BuildConfig.model_fields, "seed ", ""],
}


def fault(case: Case, folder: Path) -> str | None:
    """Run a case in an empty `folder`, and return what is not right about how it ended."""
    before = listing(folder)
    variables = {**environment(), **case.environment}
    limited = ["prlimit", f"--data={MEMORY:.0f}", *case.arguments]
    try:
        done = subprocess.run(
            [word.encode(errors="surrogateescape") for word in limited],
            cwd=folder,
            env={key: value for key, value in variables.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it had not ended after 300 s"
    except ValueError:  # a null byte, which no shell can pass either
        return None
    said = (done.stdout + done.stderr).decode(errors="replace")
    if "Traceback (most recent call last)" in said:
        return f"traceback:\n{said[-1500:]}"
    differs = {1} if case.name == "verify-resume" else set()  # what it was asked for
    if done.returncode not in CODES | differs:
        return f"exit code {done.returncode}:\n{said[-1500:]}"
    if done.returncode == 2 and len(done.stderr) > SCREEN:
        return f"a message of {len(done.stderr):,} characters, which begins {said[:300]}"
    # A build keeps its finished tasks in `.build`, so that a corrected command continues there.
    builds = case.name in ("build", "splits")
    kept = {str(path) for path in (folder / "out", folder / "out" / ".build")} if builds else set()
    left = {path for path in listing(folder) - before - kept if "/.build/" not in path or not kept}
    if done.returncode == 2 and left:
        return f"refused, but it left {sorted(left)[:5]}:\n{said[-500:]}"
    return None


def listing(folder: Path) -> set[str]:
    return {os.path.join(where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files)}


def campaign(seed: int, n_cases: int, folder: Path) -> Iterator[str]:
    """Yield each case that is not right, with what is not."""
    rng = random.Random(seed)
    (folder / "world").mkdir()
    whole = world(folder / "world")
    unchanged = listing(folder / "world")
    for number in range(n_cases):
        (case_dir := folder / f"case{number}").mkdir()
        case = draw(rng, whole, case_dir)
        found = fault(case, case_dir)
        if not found and (changed := listing(folder / "world") ^ unchanged):
            found = f"it changed {sorted(changed)[:5]}"
            unchanged = listing(folder / "world")
        if found:
            yield f"case {number} of seed {seed}: {case}\n{found}"


if __name__ == "__main__":
    with TemporaryDirectory() as own:
        wrong = False
        for text in campaign(int(sys.argv[1]), int(sys.argv[2]), Path(own)):
            wrong = True
            print(text, flush=True)
    sys.exit(wrong)
