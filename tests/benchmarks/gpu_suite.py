"""Runs the rows of the GPU table one by one within a budget of time, and renders what is there; see gpu_suite.sh.

A row is one run of throughput.py or of another script here, in a process of its own. When it is done its figures are in
OUT/ROW.json, and a row that failed by itself has its reason in OUT/ROW.failed; both are skipped from then on. A row
that was cut off leaves its rounds in OUT/ROW.part and is begun again. The seconds spent are kept in OUT/spent.json
while a row runs, so that a killed call counts too.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import adam
import recompute
import throughput
import torch

from megagpt.atomic_files import write_atomically

HERE = Path(__file__).parent
CALL_SECONDS, ALL_SECONDS = 9 * 60, 25 * 60


# Each has parse(arguments), main(arguments), which writes JSON, and table(of that).
PROGRAMS: dict[str, ModuleType] = {"throughput": throughput, "adam": adam, "recompute": recompute}


@dataclass(frozen=True)
class Row:
    """One table: what it shows, how it is measured, and how many seconds it may need."""

    name: str
    shows: str
    estimate: int
    options: tuple[str, ...]
    program: str = "throughput"
    tiny: tuple[str, ...] = ("--model", "tiny", "--steps", "1", "--rounds", "1")  # the same path, to try it on a CPU

    def files(self, out: Path) -> tuple[Path, Path]:
        """Its figures, or why there are none."""
        return out / f"{self.name}.json", out / f"{self.name}.failed"

    def arguments(self, device: str) -> list[str]:
        return ["--device", device, *(self.options if device == "cuda" else self.tiny)]


def contest(
    name: str,
    shows: str,
    model: str,
    micro_batch: int,
    tokens_per_step: int,
    peers: tuple[str, ...],
    estimate: int,
    *,
    seq: int = 1024,
    rounds: int = 3,
    fresh: bool = False,
) -> Row:
    """A row of throughput.py."""
    sizes = {"model": model, "seq": seq, "micro-batch": micro_batch, "tokens-per-step": tokens_per_step}
    sizes |= {"steps": 5, "rounds": rounds}
    tiny = {"model": "tiny", "vocab-size": 1000, "seq": 64, "micro-batch": 4, "tokens-per-step": 1024}
    tiny |= {"steps": 2, "rounds": 2, "warmup": 1}
    more = [*(["--fresh"] if fresh else []), "--peers", *peers]
    options, small = (
        (*(word for key, value in of.items() for word in (f"--{key}", str(value))), *more) for of in (sizes, tiny)
    )
    return Row(name, shows, estimate, options, tiny=small)


def ablation(name: str, shows: str, *variants: str, estimate: int = 180) -> Row:
    """`ours` with one thing changed, against `ours`, at 124M and 262,144 tokens a step."""
    return contest(name, shows, "124M", 64, 2**18, ("ours", *(f"ours {v}" for v in variants)), estimate, rounds=2)


ZERO, FULL = "zero_optimization", 'megagpt.recompute={"policy":"full"}'
PEERS = ("ours", "plain", "gpt2-compile")
HF_PEERS = ("ours", "hf-compile", "hf-trainer", "hf-trainer-compile")
ROWS = (  # in order of worth
    contest("124M", "124M against its peers", "124M", 64, 2**19, (*PEERS, "hf"), 300),
    contest("1558M", "1.5B: DeepSpeed's cost", "1558M", 16, 2**17, ("ours", "plain"), 420, rounds=2, fresh=True),
    ablation("micro_batch", "sequences in a micro-batch", *(f"train_micro_batch_size_per_gpu={n}" for n in (32, 128))),
    contest("350M", "350M against its peers", "350M", 32, 2**18, PEERS, 200, rounds=2),
    ablation("compile", "without torch.compile", "megagpt.compile=false", estimate=120),
    ablation("stages", "ZeRO stages", *(f"{ZERO}.stage={stage}" for stage in (0, 2, 3))),
    ablation(
        "hooks",
        "gradient hooks, overlap, large buckets",
        f"{ZERO}.contiguous_gradients=true",
        f"{ZERO}.contiguous_gradients=true {ZERO}.overlap_comm=true",
        f"{ZERO}.reduce_bucket_size=500000000 {ZERO}.allgather_bucket_size=500000000",
    ),
    ablation(
        "checks",
        "DeepSpeed's timer and overflow check",
        "timers.throughput.enabled=true",
        "bf16.check_grad_overflow=true",
    ),
    contest("124M_hf", "Hugging Face compiled, and its Trainer", "124M", 32, 2**18, HF_PEERS, 240, rounds=2),
    ablation(
        "precision",
        "autocast instead of a bf16 model, offload of Adam",
        "bf16.enabled=false torch_autocast.enabled=true torch_autocast.dtype=bfloat16",
        f"{ZERO}.offload_optimizer.device=cpu",
    ),
    ablation(
        "recompute",
        "recomputed blocks",
        'megagpt.recompute={"policy":"every_k","k":2}',
        FULL,
    ),
    Row("adam", "Adam's step alone: torch's fused kernel against DeepSpeed's", 60, ("--model", "124M"), "adam"),
    Row(
        "ladder",
        "what recompute policies keep, and what they cost",
        240,
        ("--model", "124M", "--seq", "1024", "--micro-batch", "32", "--steps", "3", "--rounds", "2"),
        "recompute",
    ),
    contest("32k", "32,768 tokens a sequence", "124M", 1, 2**17, (f"ours {FULL}",), 120, seq=2**15, rounds=2),
    contest("774M", "774M against its peers", "774M", 16, 2**17, PEERS, 300, rounds=1, fresh=True),
)


class Clock:
    """Seconds spent by all calls together, kept in a file every second."""

    def __init__(self, file: Path) -> None:
        self.file, self.before, self.kept, self.began = file, 0.0, 0.0, time.monotonic()
        if file.exists():
            self.before = json.loads(file.read_text())["seconds"]
        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        while True:
            seconds = round(self.before + self.of_call(), 1)
            write_atomically(self.file, json.dumps({"seconds": seconds}).encode())
            self.kept = seconds
            time.sleep(1.0)

    def of_call(self) -> float:
        return time.monotonic() - self.began


def run(out: Path, device: str, call_seconds: float, all_seconds: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(out.absolute() / "compiled"))  # for all rows and calls
    clock = Clock(out / "spent.json")
    budget = min(call_seconds, all_seconds - clock.before)
    for row in ROWS:
        done, failed = row.files(out)
        left = budget - clock.of_call()
        if done.exists() or failed.exists() or left < (row.estimate if device == "cuda" else 5):
            continue
        say(f"{row.name}: {row.shows}; {left:.0f} s left in this call")
        unfinished = out / f"{row.name}.part"
        try:
            measure(row, device, unfinished, out / f"{row.name}.log", left)
            unfinished.rename(done)
        except subprocess.TimeoutExpired:
            say(f"{row.name}: cut off, {call_seconds:.0f} s are over")
            if left >= 0.95 * call_seconds:
                failed.write_text("longer than a call\n")
        except RuntimeError as error:  # the other rows are worth as much
            failed.write_text(f"{error}\n")
            say(f"{row.name}: {error}")
    missing = [row.name for row in ROWS if not any(file.exists() for file in row.files(out))]
    spent = clock.before + clock.of_call()
    over = spent + min((row.estimate for row in ROWS if row.name in missing), default=0) > all_seconds
    say(
        f"{spent:.0f} of {all_seconds:.0f} s spent; "
        + ("nothing is left" if not missing or over else f"left: {', '.join(missing)}")
        + (f", and no time for {', '.join(missing)}" if missing and over else "")
    )


def measure(row: Row, device: str, file: Path, log: Path, seconds: float) -> None:
    """One row in a process of its own, which leaves no memory of the GPU behind, into `file`.

    Raises TimeoutExpired if it is not done after so long, RuntimeError if it or its first contestant failed.
    """
    command = [sys.executable, str(HERE / f"{row.program}.py"), *row.arguments(device), "--json", str(file)]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            code = process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):  # also what it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        raise RuntimeError((log.read_text(errors="replace").strip() or f"exit code {code}").splitlines()[-1])
    first = next(iter(json.loads(file.read_text()).get("contestants", {"": {}}).values()))
    if "failed" in first:
        raise RuntimeError(first["failed"])


def render(out: Path) -> str:
    """Markdown of every row, measured or not."""
    parts = []
    for row in ROWS:
        done, failed = row.files(out)
        part = out / f"{row.name}.part"
        what = "not measured"
        if done.exists() or part.exists():
            what = PROGRAMS[row.program].table(json.loads((done if done.exists() else part).read_text()))
        if part.exists():
            what = f"Cut off before its last round:\n\n{what}"
        if failed.exists():
            what += f" ({failed.read_text().strip()})"
        parts.append(f"**{row.shows}** (`{row.name}`)\n\n{what}")
    return "\n\n".join(parts)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=HERE / "gpu")
    parser.add_argument("--call-seconds", type=float, default=CALL_SECONDS, help="this call ends after so many")
    parser.add_argument("--all-seconds", type=float, default=ALL_SECONDS, help="all calls together")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not args.table and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu tries the script")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started is ended
    if not args.table:
        run(args.out, args.device, args.call_seconds, args.all_seconds)
    print(render(args.out))


if __name__ == "__main__":
    main()
