"""`megagpt tune RUN.json --transfer`: measure how learning rates move from narrow models to the run file's width."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from megagpt.atomic_files import write_atomically
from megagpt.config.deepspeed import OptimizerParams
from megagpt.config.model import ModelConfig
from megagpt.config.run_file import RunConfig, load_run_config
from megagpt.distributed.rank_variables import without_launcher
from megagpt.errors import UserError, writing_to
from megagpt.terminal import show
from megagpt.train.preflight import refused_data
from megagpt.tuning.rate_test import SHORT_RUN, as_typed
from megagpt.tuning.transfer_report import Measured, as_json, tables, told
from megagpt.tuning.trial import end_with_parent
from megagpt.tuning.width_runs import CHECKED, Found, Request
from megagpt.tuning.widths import three_widths

TRANSFER = "transfer.json"
MOST_VAL_TOKENS = 131_072  # of each measurement
LR, MUON_LR = "optimizer.params.lr", "optimizer.params.muon_lr"


def measure_transfer(run: RunConfig, run_file: Path, given: Sequence[str], *, steps: int, folder: Path) -> None:
    """Measure, print tables and what they show, and write all into `folder`. Raises UserError."""
    if run.megagpt.init_from is not None:
        raise UserError(
            f"megagpt.init_from={run.megagpt.init_from} has weights of one width, and --transfer compares three; add "
            "megagpt.init_from=null"
        )
    optimizers, own = _optimizers(run), run.deepspeed.optimizer.type
    widths = [[*given, *keys] for keys in three_widths(run.megagpt.model)]
    models = [_model(run_file, options) for options in widths]
    if refused := refused_data(run):
        raise refused
    with writing_to(folder, "--study"):  # now, not after minutes of training
        folder.mkdir(parents=True, exist_ok=True)
    found = [Measured(name, *_rate(rates)) for name, (_, rates) in optimizers.items()]
    at_least = 3 * len(widths) * len(optimizers)  # the best rate of each, and a worse one on both of its sides
    show(f"{len(widths)} widths with {' and '.join(optimizers)}: at least {at_least} runs of {steps} steps")
    with tempfile.TemporaryDirectory() as scratch:
        for model, options in zip(models, widths, strict=True):
            request = Request(
                run_file=str(run_file),
                options=[*options, *_short(run)],
                optimizers={one.optimizer: optimizers[one.optimizer][0] for one in found},
                rates={one.optimizer: optimizers[one.optimizer][1] for one in found},
                starts={one.optimizer: one.best(-1) if one.losses else 0 for one in found},
                also={one.optimizer: one.best(0) for one in found if model is models[-1]},
                steps=steps,
                folder=f"{scratch}/{model.n_embd}",
            )
            for one, answer in zip(list(found), _answers(request), strict=True):
                if answer.refused:
                    show(f"{one.optimizer} is not measured: {answer.refused}")
                    found.remove(one)
                    if one.optimizer == own:
                        raise UserError(f"the model that is {model.n_embd} wide cannot be trained: {answer.refused}")
                    continue
                one.add(model.n_embd, answer.sizes, answer.losses)
                show(one.progress())
    text = told(found, steps)
    show("\n".join(["", *tables(found, steps, CHECKED), "", text]))
    facts = as_json(found, run_file, steps=steps, checked=CHECKED, text=text)
    with writing_to(folder, "--study"):
        write_atomically(folder / TRANSFER, (json.dumps(facts, indent=1) + "\n").encode())
    show(f"{folder / TRANSFER}: all sizes and losses")


def _optimizers(run: RunConfig) -> dict[str, tuple[list[str], dict[str, float]]]:
    """Return keys and rates of the run file's optimizer, and of Muon next to Adam or of AdamW next to Muon."""
    own, params = run.deepspeed.optimizer.type, run.deepspeed.optimizer.params
    adam, both = {LR: params.lr}, {LR: params.lr, MUON_LR: params.of_muon}
    if own == "Muon":
        return {"AdamW": (["optimizer.type=AdamW", *_unset("muon_lr", "momentum")], adam), "Muon": ([], both)}
    return {own: ([], adam), "Muon": (["optimizer.type=Muon", *_unset("torch_adam", "adam_w_mode")], both)}


def _unset(*keys: str) -> list[str]:
    """Return settings of another optimizer at their defaults, which all take."""
    return as_typed({f"optimizer.params.{key}": OptimizerParams.model_fields[key].default for key in keys})


def _rate(rates: dict[str, float]) -> tuple[str, float]:
    """Return the key and value of the rate that the blocks' matrices have."""
    return list(rates.items())[-1]


def _model(run_file: Path, options: Sequence[str]) -> ModelConfig:
    try:
        return load_run_config(run_file, options).megagpt.model
    except UserError as error:
        raise UserError(f"--transfer makes narrower models, and one of them is refused: {error}") from None


def _short(run: RunConfig) -> list[str]:
    tokens = min(run.megagpt.data.val_tokens or MOST_VAL_TOKENS, MOST_VAL_TOKENS)
    return as_typed({**SHORT_RUN, "megagpt.data.val_tokens": tokens, "megagpt.compile": False})


def _answers(request: Request) -> Iterator[Found]:
    """Run one width in a process of its own; yield its answers. Raises UserError if it ends before the last."""
    log = Path(f"{request.folder}.log")
    with log.open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "megagpt.tuning.width_runs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=without_launcher(os.environ),
            preexec_fn=end_with_parent,
        )
        try:
            yield from _read(process, request, log)
        finally:  # also where an answer or Ctrl-C ends it all
            process.kill()
            process.communicate()


def _read(process: subprocess.Popen[str], request: Request, log: Path) -> Iterator[Found]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # the log tells why it has ended
        process.stdin.write(json.dumps(asdict(request)) + "\n")
        process.stdin.flush()
    for _ in request.optimizers:
        if not (line := process.stdout.readline()):
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UserError(f"the short runs failed: {said[-1]}")
        raw = json.loads(line)
        yield Found(**raw | {"losses": {int(i): loss for i, loss in raw["losses"].items()}})
