"""One of three ranks, some of which fail to connect where the others succeed; rank 0 prints what each rank found."""

import json
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megagpt.checkpoint.async_writer import Writer
from megagpt.distributed import process_group
from megagpt.distributed.collectives import StopVote, gather_objects, neighbors, sum_over_ranks
from megagpt.distributed.process_group import TIMEOUT, is_main, leave, rank
from megagpt.distributed.rank_variables import read_place
from megagpt.distributed.rendezvous import meet
from megagpt.errors import UserError

# The ranks that fail in each connection of gloo. First come the default group, the vote's, the writer's and the
# neighbors', each in its second attempt.
FAILING: list[set[int]] = [{1, 2}, set(), {0}, set(), {2}, set(), {1}, set()]
FAILING += [{0}, {1, 2}, {2}]  # a vote that never connects


connect, turns = dist.ProcessGroupGloo.__init__, iter(FAILING)


def stumble(*args: Any, **kwargs: Any) -> None:
    """Connect, and believe that it failed if it is this rank's turn."""
    connect(*args, **kwargs)
    if read_place(os.environ).rank in next(turns):
        raise RuntimeError("Connect timeout")


def main() -> int:
    process_group.CONNECT = timedelta(seconds=20)
    dist.ProcessGroupGloo.__init__ = stumble
    meet()
    vote, writer, three = StopVote(), Writer(asynchronous=True), neighbors(3)
    with vote:
        votes = [vote(rank() == 1), vote(False)]
    groups = [dist.group.WORLD, vote._group, writer.group, three]
    found = {
        "sum": sum_over_ranks(torch.tensor([rank()])).item(),
        "votes": votes,
        "gathered": [gather_objects(rank(), group) for group in groups],
        "long": all(group._get_backend(torch.device("cpu")).options._timeout == TIMEOUT for group in groups if group),
    }
    try:
        StopVote()
    except UserError as error:
        found["refused"] = str(error)
    reports = gather_objects(found)
    if is_main():
        print(json.dumps(reports))
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
