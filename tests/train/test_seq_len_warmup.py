"""Rows that are short at first (schedule.seq_len_warmup_steps): the same tokens in shorter pieces.

That a cut run is a straight one's, on two ranks and at every ZeRO stage, is in train/test_two_ranks.py.
"""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from support import DEBUG_RUN, debug_run, metric, overrides
from torch.nn import functional as F

from megagpt.checkpoint.load import load_model
from megagpt.checkpoint.run_samples import open_run
from megagpt.config.schedule import ScheduleConfig
from megagpt.data.loss_mask import unmarked
from megagpt.errors import UserError
from megagpt.lint.linter import lint_file
from megagpt.train.trainer import train

SHORT = ["megagpt.schedule.seq_len_warmup_steps=4", "megagpt.schedule.first_seq_len=16"]
SMALL = ['megagpt.every={"log": 1, "eval": 0, "save": 0}', "megagpt.data.val_tokens=128"]


def test_rows_double_and_each_length_holds_as_long():
    cfg = ScheduleConfig(max_steps=20, seq_len_warmup_steps=9, first_seq_len=8)
    assert [cfg.rows(64).at(step) for step in range(11)] == [8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64]
    assert ScheduleConfig(max_steps=20).rows(64).at(0) == 64


@pytest.mark.parametrize("kind", ["concatenate", "concatenate-masked", "best-fit"])
def test_a_step_in_short_rows_is_the_step_computed_by_hand(dataset, device, tmp_path, kind):
    """The next step's samples are cut by hand, and each piece is read alone by the saved model, in plain torch."""
    options = [*SMALL, f"megagpt.packing.kind={kind}", "megagpt.schedule.max_steps=5"]
    train(debug_run(dataset, tmp_path / "run", *options), device, stop_at=2)
    loaded = load_model(tmp_path / "run" / "checkpoints" / "latest", device)
    data, rows = open_run(tmp_path / "run"), np.empty((8, 65), dtype=np.int64)
    data.fill(data.mixture.samples_of(3).start, rows)
    tokens, kept = torch.from_numpy(unmarked(rows)), torch.from_numpy(rows[:, 1:] >= 0)
    train(debug_run(dataset, tmp_path / "run", *options, *SHORT), device, stop_at=3)

    model, pieces = loaded.model.train(), []
    for row in tokens:
        for begin in range(0, 64, 32):  # step 3 of 4 reads halves of rows
            piece = row[begin : begin + 33]
            ends = [i for i in range(1, 32) if kind != "concatenate" and piece[i] == loaded.tokenizer.eod_id]
            for a, b in pairwise([0, *ends, 32]):
                logits = model(piece[None, a:b])
                pieces.append(F.cross_entropy(logits[0], piece[a + 1 : b + 1], reduction="none"))
    loss = (torch.cat(pieces).view(8, 64) * kept).mean()
    loss.backward()
    assert metric(tmp_path / "run", "train/loss")[3] == pytest.approx((loss / kept.float().mean()).item(), abs=1e-5)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert metric(tmp_path / "run", "optim/grad_norm")[3] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["megagpt.schedule.seq_len_warmup_steps=4"],
            "first_seq_len=null with .*seq_len_warmup_steps=4: the two belong",
        ),
        (["megagpt.schedule.first_seq_len=16"], "first_seq_len=16 with .*seq_len_warmup_steps=0: the two belong"),
        (
            [*SHORT, "megagpt.schedule.first_seq_len=24"],
            r"first_seq_len=24 does not double to .*model.seq_len=64; set megagpt.schedule.first_seq_len to (16|32)$",
        ),
        (
            [*SHORT, "megagpt.schedule.first_seq_len=128"],
            r"first_seq_len=128 does not double to .*=64; set megagpt.schedule.first_seq_len to 32$",
        ),
        (
            [*SHORT, "megagpt.data.seq_len=48"],
            r"first_seq_len=16 does not double to megagpt.data.seq_len=48; set .*first_seq_len to (12|24)$",
        ),
        (
            [*SHORT, "megagpt.schedule.seq_len_warmup_steps=21"],
            "is more than megagpt.schedule.max_steps=20.*set .* to 5",
        ),
        ([*SHORT, "sequence_parallel_size=2"], "sequence_parallel_size=2 divides each row.*seq_len_warmup_steps=4"),
    ],
)
def test_rows_that_do_not_double_to_whole_ones_are_refused_by_training_and_by_lint(dataset, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        debug_run(dataset, tmp_path / "run", *options)
    [found] = lint_file(DEBUG_RUN, [*overrides(dataset, tmp_path / "run"), *options])
    assert re.search(message, found.text)
