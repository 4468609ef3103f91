"""`megagpt checkpoints RUN`: list every saved step of a run, and whether it is complete."""

import argparse
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megagpt.checkpoint.commit import COMMIT, best, committed, damage_of, folder, read_commit
from megagpt.checkpoint.finite import not_finite_file
from megagpt.checkpoint.named_step import similar_run
from megagpt.errors import UserError
from megagpt.terminal import counted, show


@dataclass(frozen=True)
class Listed:
    """One committed step."""

    step_dir: Path
    step: int
    saved_at: datetime
    of_file: bool  # saved_at is the file's time, which copying changes: an older megagpt recorded none
    n_bytes: int
    stage: int
    dtype: str
    ranks: int
    val_loss: float | None  # nats per token, of the last evaluation
    damage: str | None  # the first thing found wrong


def listed(out_dir: Path, *, hashes: bool) -> list[Listed]:
    """Return the committed steps, oldest first; without `hashes` only the files' sizes are compared.

    A step whose commit record cannot be read has its damage but no stage, dtype or ranks. A step that a live run
    deletes meanwhile is left out.
    """
    rows = []
    for step_dir in committed(out_dir):
        with suppress(FileNotFoundError):
            rows.append(_listed(step_dir, hashes))
    return [row for row in rows if (row.step_dir / COMMIT).is_file()]


def _listed(step_dir: Path, hashes: bool) -> Listed:
    """Read one step's commit record and check its files."""
    file_time = datetime.fromtimestamp((step_dir / COMMIT).stat().st_mtime).astimezone()
    n_bytes = sum(path.stat().st_size for path in step_dir.iterdir() if path.is_file())
    try:
        # Rank 0's files, and COMMIT.
        if damage := damage_of(step_dir, 0, hashes=hashes):
            raise UserError(damage)
        saved = read_commit(step_dir)
    except UserError as error:
        step = int(step_dir.name.removeprefix("step_"))
        return Listed(step_dir, step, file_time, True, n_bytes, -1, "?", 0, None, str(error))
    what, ranks = saved.identity, saved.identity.world_size
    # The other ranks' files.
    damage = damage_of(step_dir, 1, every=1, hashes=hashes) or (not_finite_file(step_dir) if hashes else None)
    if damage is None and saved.state.health.bad_in_a_row:
        damage = "its last training step was not finite"
    return Listed(
        step_dir,
        saved.state.step,
        file_time if saved.saved_at is None else datetime.fromtimestamp(saved.saved_at).astimezone(),
        saved.saved_at is None,
        n_bytes,
        what.zero_stage,
        what.dtype,
        ranks,
        saved.state.val_loss,
        damage,
    )


def checkpoint_table(out_dir: Path, *, hashes: bool) -> tuple[str, bool]:
    """Return the table, and whether any step is complete. Raises UserError if there is no folder of checkpoints."""
    if not folder(out_dir).is_dir():
        is_step = " but is one, or the weights of one" if (out_dir / COMMIT).is_file() else ""
        near = None if out_dir.exists() else similar_run(out_dir)
        wrong = f"holds no checkpoints{is_step}" if out_dir.exists() else "does not exist"
        way_out = f"did you mean {near}?" if near else "give a run's folder"
        raise UserError(f"{out_dir} {wrong}; {way_out}")
    rows = listed(out_dir, hashes=hashes)
    best_dir = best(out_dir)
    quarantined = [path.name for path in sorted(folder(out_dir).glob("damaged*_step_*"))]
    uncommitted = [path.name for path in sorted(folder(out_dir).glob("step_*")) if not (path / COMMIT).is_file()]
    complete = sum(row.damage is None for row in rows)
    how = "verified" if hashes else "with all files (--verify hashes them)"
    lines = [
        HEAD,
        *(_line(row, hashes=hashes, is_best=row.step_dir == best_dir) for row in rows),
        *(f"{name}: damaged, is not used" for name in quarantined),
        *(f"{name}: not committed, is not used" for name in uncommitted),
        *_rule_of_best(rows, best_dir),
        *([OF_FILE] if any(row.of_file for row in rows) else []),
        f"{counted(len(rows), 'committed step')}, {complete} {how}",
    ]
    return "\n".join(lines), complete > 0


def _rule_of_best(rows: list[Listed], best_dir: Path | None) -> list[str]:
    """Say by which rule a step is the best."""
    losses = {row.step_dir: row.val_loss for row in rows if row.val_loss is not None}
    if best_dir not in losses:
        return []
    if losses[best_dir] == min(losses.values()):
        return ["best: the lowest val/loss of these steps"]
    return ["best: no later val/loss was lower by megagpt.early_stopping.min_delta"]


OF_FILE = "*: time of the file, which copying changes; the step records none"
HEAD = f"{'step':>10}  {'saved at':<20}  {'size':>9}  {'stage':>5}  {'dtype':<5}  {'ranks':>5}  {'val/loss':>8}  state"


def _line(row: Listed, *, hashes: bool, is_best: bool) -> str:
    known = row.ranks > 0
    loss = "-" if row.val_loss is None else f"{row.val_loss:.4f}"
    state = row.damage or ("verified" if hashes else "sizes match")
    return (
        f"{row.step:>10}  {row.saved_at:%Y-%m-%d %H:%M:%S}{'*' if row.of_file else ' '}  {_size(row.n_bytes):>9}  "
        f"{row.stage if known else '?':>5}  {row.dtype:<5}  {row.ranks if known else '?':>5}  {loss:>8}  "
        f"{state}{' (best)' if is_best else ''}"
    )


def _size(n_bytes: int) -> str:
    mib = n_bytes / 2**20
    return f"{mib:.1f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def run(args: argparse.Namespace) -> int:
    """Print the table; exit code 2 if no step is complete."""
    table, any_complete = checkpoint_table(args.run_dir, hashes=args.verify)
    show(table)
    return 0 if any_complete else 2
