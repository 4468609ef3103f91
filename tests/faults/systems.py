"""The two that are struck: megagpt, and bare DeepSpeed as the baseline. Both train eight steps and save every two.

Each knows its straight run (nothing struck), how to begin in the middle of it, and whether a run that was struck and
started again is the straight one to the last bit: every logged loss, and every file of its last step.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import bare
import lab
import torch
from support import DEBUG_RUN, metric, overrides
from torch import Tensor

from megagpt.atomic_files import sha256_of
from megagpt.checkpoint.commit import committed, read_commit, step_folder, update_latest_and_best
from megagpt.cli.pretrain import pretrain
from megagpt.cli.verify_resume import same

STEPS, INTERVAL = 8, 2
TINY = [
    'megagpt.model={"n_layer": 1, "n_head": 2, "n_embd": 32, "seq_len": 32}',
    "train_batch_size=4",
    "train_micro_batch_size_per_gpu=2",
    "megagpt.schedule.shape=constant",  # a shorter run has the same rates
    "megagpt.schedule.warmup_steps=0",
    f'megagpt.every={{"log": 1, "eval": 2, "save": {INTERVAL}}}',
    "megagpt.early_stopping.restore_best=false",
    "megagpt.data.val_tokens=128",
    "megagpt.regularization.dropout=0.1",  # or nothing would depend on the random generators
    "tensorboard.enabled=false",
]


@dataclass
class Megagpt:
    dataset: Path
    home: Path  # the straight runs
    name: str = "megagpt"
    targets: tuple[str, ...] = ("model", "optim", "rng", "manifest", "COMMIT", "latest", "rotation")
    seconds: dict[int, float] = field(default_factory=dict)  # of a straight run

    def program(self, out_dir: Path, stage: int, steps: int = STEPS, *more: str) -> Callable[[], int]:
        options = [*TINY, f"zero_optimization.stage={stage}", f"megagpt.schedule.max_steps={steps}", *more]
        arguments = ["--deepspeed_config", str(DEBUG_RUN), *overrides(self.dataset, out_dir, *options)]
        return lambda: pretrain(arguments)

    def straight(self, stage: int) -> Path:
        """A run that nothing struck, with all of its steps kept."""
        out_dir = self.home / f"straight{stage}"
        if not out_dir.exists():
            keep = f"megagpt.keep.last={STEPS}"
            ended = lab.launch(self.program(out_dir, stage, STEPS, keep), self.home / f"log{stage}")
            assert ended.code == 0, ended.text
            self.seconds[stage] = ended.seconds
        return out_dir

    def begin(self, out_dir: Path, stage: int, step: int) -> None:
        """As the straight run was when it had saved `step`; nothing for step 0."""
        self.straight(stage)
        if step == 0:
            return
        shutil.copytree(self.straight(stage), out_dir)
        for step_dir in committed(out_dir):
            if int(step_dir.name[5:]) > step:
                shutil.rmtree(step_dir)
        newest = step_folder(out_dir, step)
        update_latest_and_best(out_dir, newest, read_commit(newest).state)

    def newest(self, out_dir: Path, stage: int) -> int:
        """The newest committed step; 0 if there is none."""
        return int(committed(out_dir)[-1].name[5:]) if committed(out_dir) else 0

    def files(self, out_dir: Path, step: int) -> Path:
        return step_folder(out_dir, step)

    def resumed_at(self, text: str) -> int | None:
        if "starting at step 0" in text:
            return 0
        found = re.findall(r"resuming from \S*step_(\d+)", text)
        return int(found[0]) if found else None

    def difference(self, out_dir: Path, stage: int, steps: int) -> str:
        """Between this run and the straight one at its last step; empty if there is none."""
        straight = self.straight(stage)
        losses = {step: loss for step, loss in metric(straight, "train/loss").items() if step <= steps}
        if metric(out_dir, "train/loss") != losses:
            return f"losses {metric(out_dir, 'train/loss')} in place of {losses}"
        ours, theirs = step_folder(out_dir, steps), step_folder(straight, steps)
        if read_commit(ours).state != read_commit(theirs).state:
            return f"state {read_commit(ours).state} in place of {read_commit(theirs).state}"
        return _other_file(ours, theirs, ("*.pt", "rng.*.json"))

    def other_end(self, out_dir: Path, other: Path, stage: int) -> str:
        """Between the last steps of two runs, losses aside; empty if there is no difference."""
        ours, theirs = (step_folder(run, STEPS) for run in (out_dir, other))
        return _other_file(ours, theirs, ("*.pt", "rng.*.json"))


@dataclass
class Bare:
    home: Path
    name: str = "bare DeepSpeed"
    targets: tuple[str, ...] = ("model", "optim", "latest")
    seconds: dict[int, float] = field(default_factory=dict)

    def program(self, out_dir: Path, stage: int, steps: int = STEPS, *more: str) -> Callable[[], int]:
        return lambda: bare.train(out_dir, stage, steps)

    def straight(self, stage: int) -> Path:
        out_dir = self.home / f"bare{stage}"
        if not out_dir.exists():
            ended = lab.launch(self.program(out_dir, stage), self.home / f"barelog{stage}")
            assert ended.code == 0, ended.text
            self.seconds[stage] = ended.seconds
        return out_dir

    def begin(self, out_dir: Path, stage: int, step: int) -> None:
        if step == 0:
            return
        shutil.copytree(self.straight(stage), out_dir)
        for tag in out_dir.glob("global_step*"):
            if int(tag.name[11:]) > step:
                shutil.rmtree(tag)
        (out_dir / "latest").write_text(f"global_step{step}")
        rows = _losses(self.straight(stage))
        lines = [json.dumps([at, loss]) + "\n" for at, loss in rows.items() if at <= step]
        out_dir.with_name(f"{out_dir.name}.losses").write_text("".join(lines))

    def newest(self, out_dir: Path, stage: int) -> int:
        """The newest step that lies there whole, whatever `latest` says."""
        tags = {int(tag.name[11:]): tag for tag in out_dir.glob("global_step*")}
        straight = self.straight(stage)
        whole = (at for at, tag in tags.items() if not _other_file(tag, straight / tag.name, ("*.pt",)))
        return max(whole, default=0)

    def files(self, out_dir: Path, step: int) -> Path:
        return out_dir / f"global_step{step}"

    def resumed_at(self, text: str) -> int | None:
        found = re.findall(r"starting at step (\d+)", text)
        return int(found[0]) if found else None

    def difference(self, out_dir: Path, stage: int, steps: int) -> str:
        straight, losses = self.straight(stage), _losses(out_dir)
        expected = {step: loss for step, loss in _losses(straight).items() if step <= steps}
        if losses != expected:
            return f"losses {losses} in place of {expected}"
        # of its files only the weights: others differ after any resume, a whole one too
        ours, theirs = (_weights(run / f"global_step{steps}") for run in (out_dir, straight))
        return "" if same(ours, theirs) else "weights of the last step"

    def other_end(self, out_dir: Path, other: Path, stage: int) -> str:
        ours, theirs = (_weights(run / f"global_step{STEPS}") for run in (out_dir, other))
        if not all(bool(weight.isfinite().all()) for module in ours for weight in module.values()):
            return "weights that are not finite"
        return "" if same(ours, theirs) else "weights of the last step"


System = Megagpt | Bare


def _weights(tag: Path) -> list[dict[str, Tensor]]:
    files = sorted(tag.glob("*model_states.pt"))
    return [torch.load(file, weights_only=False)["module"] for file in files]  # of our own run of a moment ago


def _losses(out_dir: Path) -> dict[int, float]:
    """The last that was written for each step."""
    rows = out_dir.with_name(f"{out_dir.name}.losses").read_text().splitlines()
    return dict(json.loads(row) for row in rows)


def _other_file(one: Path, two: Path, patterns: tuple[str, ...]) -> str:
    for pattern in patterns:
        names = sorted(path.name for path in two.glob(pattern))
        if names != sorted(path.name for path in one.glob(pattern)):
            return f"{one} has other files than {two}"
        for name in names:
            if sha256_of(one / name) != sha256_of(two / name):
                return f"{name} of the last step"
    return ""
