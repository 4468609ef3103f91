"""Verify checkpoints: find the newest step whose files are undamaged, each rank hashing a share. Collective."""

from dataclasses import replace
from pathlib import Path

from megagpt.checkpoint.commit import Saved, commit_on_record, committed, damage_of, folder, read_commit
from megagpt.checkpoint.finite import find_not_finite
from megagpt.distributed.collectives import broadcast_object, gather_objects
from megagpt.distributed.process_group import Group, print_rank0, rank, world_size
from megagpt.errors import UserError


def damaged_of_newest(out_dir: Path, group: Group) -> list[Path]:
    """Return the damaged steps among those newer than the second undamaged one. Collective.

    Checked before an older step is deleted: the steps that replace it may have been damaged since they were written.
    """
    whole, damaged = 0, []
    for step_dir in reversed(gather_objects(committed(out_dir), group)[0]):
        damage = find_damage(step_dir, group)
        if damage is None:
            whole += 1
        else:
            damaged.append(step_dir)
            print_rank0(f"checkpoint quarantined: {damage}")
        if whole == 2:
            break
    return damaged


def newest_verified(out_dir: Path) -> Saved | None:
    """Return the newest step that every rank can verify and whose numbers are finite; None before the first commit.

    Collective. Raises UserError if a step was ever committed and none verifies: a silent start from step 0 would lose
    the run.
    """
    seen_here = committed(out_dir), commit_on_record(out_dir)
    candidates, recorded = broadcast_object(seen_here)
    refused: list[Path] = []
    doubtful: Saved | None = None
    first_damage = ""
    for step_dir in reversed(candidates):
        damage = find_damage(step_dir) or find_not_finite(step_dir)
        if damage is None:
            saved = replace(read_commit(step_dir), passed_over=tuple(refused))
            if saved.state.health.bad_in_a_row == 0:
                return saved
            # An older megagpt saved in the middle of steps that were not finite: its weights may be what broke them.
            doubtful, damage = doubtful or saved, f"the last training step of {step_dir} was not finite"
        refused.append(step_dir)
        print_rank0(f"checkpoint skipped: {damage}")
        first_damage = first_damage or damage
    if doubtful is not None:
        print_rank0(f"no other step is undamaged: using {doubtful.step_dir}")
        return doubtful
    if recorded is not None and not refused:
        first_damage = f"{recorded} was committed and is missing"
    if first_damage:
        raise UserError(
            f"no checkpoint in {folder(out_dir)} is undamaged ({first_damage}); restore the file, or give --fresh to "
            "start again at step 0 (the old run is renamed and kept)"
        )
    return None


def find_damage(step_dir: Path, group: Group = None) -> str | None:
    """Return what is wrong with a step's files, or None. Each rank hashes a share of them. Collective."""
    own = damage_of(step_dir, rank(), every=world_size())
    return next(filter(None, gather_objects(own, group)), None)
