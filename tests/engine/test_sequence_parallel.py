"""Ranks that share each sample's positions (DeepSpeed-Ulysses) compute what one rank computes alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PROGRAMS, SHARING, debug_run, metric, scenarios, torchrun
from torch import Tensor

from megagpt.checkpoint.commit import committed
from megagpt.data.loader import rank_slice
from megagpt.engine.state_files import consolidated_weights
from megagpt.model.attention import ATTENTION, over_ranks
from megagpt.model.masks import document_positions
from megagpt.train.trainer import train

# fp32, sums in another order: 1e-6 was seen. Weights move apart further, because no loss depends on the keys' bias:
# its gradient is rounding alone, which Adam scales up to steps of its own size where epsilon does not hold it down.
WITHIN_NATS, WITHIN_WEIGHTS = 1e-5, 5e-5


def equal_runs(shared: Path, whole: Path) -> None:
    for name in ("train/loss", "val/loss", "optim/grad_norm"):
        found, expected = metric(shared, name), metric(whole, name)
        assert found == pytest.approx(expected, abs=WITHIN_NATS), name
    assert metric(whole, "train/loss").keys() == set(range(1, 9))
    weights = consolidated_weights(committed(shared)[-1])
    for name, weight in consolidated_weights(committed(whole)[-1]).items():
        torch.testing.assert_close(weights[name], weight, atol=WITHIN_WEIGHTS, rtol=0, msg=name)


@pytest.fixture(scope="module")
def alone(dataset, device, tmp_path_factory) -> Callable[[str], Path]:
    """The out_dir of a run by one rank, trained once."""
    folder = tmp_path_factory.mktemp("alone")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            train(debug_run(dataset, folder / name, *SHARING[name]), device)
        return folder / name

    return run


@pytest.fixture(scope="module")
@processes.start_here
def two_ranks(dataset, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks returned."""
    return scenarios("sequence_parallel_ranks.py", dataset, tmp_path_factory.mktemp("sharing"))["sharing_positions"]


@pytest.fixture(scope="module")
def shared(two_ranks) -> Path:
    return Path(two_ranks[0]["folder"])


@pytest.mark.parametrize("name", SHARING)
def test_two_ranks_that_share_positions_train_what_one_trains(shared, alone, name):
    equal_runs(shared / name, alone(name))


def test_in_bf16_too(shared):
    """Activations have 8 bits, so the first loss agrees to 1/256 of a nat, and Adam's first steps keep it so."""
    by = [metric(shared / f"bf16 by {size}", "train/loss") for size in (1, 2)]
    assert by[0] == pytest.approx(by[1], abs=2**-8)


def test_resuming_is_bit_exact(two_ranks):
    """With dropout, of which every rank draws its own, and recompute at stage 3."""
    for found in two_ranks:
        assert found["cut_at"] == 5  # the vote cast after step 4 is read after step 5
        straight, resumed = found["states"]
        assert straight == resumed
        straight, resumed = found["weights"]
        assert straight == resumed


def test_a_run_goes_on_with_another_number_of_ranks_to_a_sample(shared, alone):
    equal_runs(shared / "changed", alone("stage1"))


def test_every_rank_generates_whole_texts(two_ranks):
    texts = [found["texts"] for found in two_ranks]
    assert texts[0] == texts[1]
    engine, checkpoint = texts[0]
    assert engine == checkpoint


@pytest.mark.process
def test_two_groups_of_two_ranks_train_what_one_rank_trains(alone, dataset, tmp_path):
    done = torchrun(4, PROGRAMS / "four_ranks.py", dataset, tmp_path / "run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    equal_runs(tmp_path / "run", alone("stage1"))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_attention_over_ranks_is_attention_over_all_positions(P, heads_each, T, B, masked):
    """All ranks in one process: what each sends is put down, and its part of what the others sent is taken up."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, B, P * heads_each, P * T, 4, generator=generator, dtype=torch.float64)
    mask = document_positions(torch.randint(0, 2, (B, P * T), generator=generator))[1] if masked else None
    parts = [[x[:, :, rank_slice(P * T, rank, P)] for x in (q, k, v)] for rank in range(P)]

    def run(rank: int, received: list[Tensor]) -> list[Tensor]:
        """What this rank sends, up to the first exchange that it has no answer to yet; then what it returns."""
        sent: list[Tensor] = []

        def exchange(x: Tensor) -> Tensor:
            sent.append(x)
            if len(sent) > len(received):
                raise StopIteration
            return received[len(sent) - 1]

        try:
            return [*sent, over_ranks(ATTENTION["eager"], exchange, P)(*parts[rank], 0.0, mask)]
        except StopIteration:
            return sent

    received: list[list[Tensor]] = [[] for _ in range(P)]
    for round in range(2):
        sent = [run(rank, received[rank])[round] for rank in range(P)]
        for rank in range(P):
            received[rank].append(torch.stack([x[rank] for x in sent]))
    whole = torch.cat([run(rank, received[rank])[-1] for rank in range(P)], dim=2)
    torch.testing.assert_close(whole, ATTENTION["eager"](q, k, v, 0.0, mask))
