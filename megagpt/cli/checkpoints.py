"""What `megagpt checkpoints RUN` prints: every step of a run, and whether it is whole."""

import argparse
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megagpt.checkpoint.commit import COMMIT, best, committed, damage_of, folder, read_commit
from megagpt.errors import UserError


@dataclass(frozen=True)
class Listed:
    step_dir: Path
    step: int
    saved_at: datetime
    n_bytes: int
    stage: int
    dtype: str
    ranks: int
    val_loss: float | None  # nats per token, of the last evaluation
    damage: str | None  # the first thing found wrong


def listed(out_dir: Path, *, hashes: bool) -> list[Listed]:
    """The committed steps that can be read, oldest first; without `hashes` only sizes are compared.

    A step whose commit record cannot be read is listed with nothing but its damage.
    """
    return [_listed(step_dir, hashes) for step_dir in committed(out_dir)]


def _listed(step_dir: Path, hashes: bool) -> Listed:
    saved_at = datetime.fromtimestamp((step_dir / COMMIT).stat().st_mtime).astimezone()
    n_bytes = sum(path.stat().st_size for path in step_dir.iterdir() if path.is_file())
    try:
        if damage := damage_of(step_dir, 0, hashes=hashes):  # which reads COMMIT too
            raise UserError(damage)
        saved = read_commit(step_dir)
    except UserError as error:
        step = int(step_dir.name.removeprefix("step_"))
        return Listed(step_dir, step, saved_at, n_bytes, -1, "?", 0, None, str(error))
    what, ranks = saved.identity, saved.identity.world_size
    damage = damage_of(step_dir, 1, every=1, hashes=hashes)  # of the other ranks
    return Listed(
        step_dir,
        saved.state.step,
        saved_at,
        n_bytes,
        what.zero_stage,
        what.dtype,
        ranks,
        saved.state.val_loss,
        damage,
    )


def checkpoint_table(out_dir: Path, *, hashes: bool) -> tuple[str, bool]:
    """The table, and whether any step is whole. Raises UserError if no folder of checkpoints is there."""
    if not folder(out_dir).is_dir():
        raise UserError(f"{out_dir} holds no checkpoints; give a run's out_dir")
    rows = listed(out_dir, hashes=hashes)
    named = best(out_dir)
    lines = [
        f"{'step':>10}  {'saved at':<19}  {'size':>9}  {'stage':>5}  {'dtype':<5}  {'ranks':>5}  {'loss/val':>8}  state"
    ]
    for row in rows:
        known = row.ranks > 0
        state = row.damage or ("verified" if hashes else "sizes match")
        lines.append(
            f"{row.step:>10}  {row.saved_at:%Y-%m-%d %H:%M:%S}  {_size(row.n_bytes):>9}  "
            f"{row.stage if known else '?':>5}  {row.dtype:<5}  {row.ranks if known else '?':>5}  "
            f"{'-' if row.val_loss is None else f'{row.val_loss:.4f}':>8}  "
            f"{state}{' (best)' if row.step_dir == named else ''}"
        )
    aside = [path.name for path in sorted(folder(out_dir).glob("damaged*_step_*"))]
    torn = [path.name for path in sorted(folder(out_dir).glob("step_*")) if not (path / COMMIT).is_file()]
    lines += [f"{name}: put aside, does not count" for name in aside]
    lines += [f"{name}: not committed, does not count" for name in torn]
    whole = sum(row.damage is None for row in rows)
    how = "verify" if hashes else "have all their files (--verify hashes them)"
    lines.append(f"{whole} of {len(rows)} committed steps {how}")
    return "\n".join(lines), whole > 0


def _size(n_bytes: int) -> str:
    mib = n_bytes / 2**20
    return f"{mib:.1f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def run(args: argparse.Namespace) -> int:
    table, any_whole = checkpoint_table(args.run_dir, hashes=args.verify)
    print(table)
    return 0 if any_whole else 2
