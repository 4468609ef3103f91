"""The links between the ranks of a plan: their speed, their hops, and which ranks they connect."""

import pytest

from megagpt.errors import UserError
from megagpt.planner.network import network_of


def test_rings_use_all_cards_of_a_host_and_no_more_than_the_link():
    """64 H100s with 450 GB/s to their host: eight cards of 50 GB/s carry 400, of 100 the link's 450, one card 12.5."""
    speeds = {"infiniband-ndr": 400, "50": 400, "100": 450, "ethernet-100": 12.5, "4x25": 100}
    assert {name: network_of(name, 64, 450).ring / 1e9 for name in speeds} == speeds
    assert network_of(None, 8, 450).ring == network_of(None, 8, 450).exchange(8) == 450e9
    assert network_of("50", 8, 450).ring == 50e9  # hosts of one GPU
    cards = network_of("infiniband-ndr", 64, 450)
    assert (cards.exchange(8), cards.exchange(64)) == (450e9, 50e9)  # of one host, and over all


def test_hops_of_a_ring_and_of_a_tree():
    """16 ranks on two hosts: a ring has 14 hops inside hosts and one between; a tree goes up and down 7 and one."""
    two = network_of("infiniband-ndr", 16, 450)
    assert two.ring_latency(16) == pytest.approx(10e-6 + 14 * 1.9e-6 + 4e-6)
    assert two.tree_latency == pytest.approx(4.4e-6 + 2 * (7 * 1.2e-6 + 8.5e-6))
    assert two.ring_latency(8) == pytest.approx(10e-6 + 7 * 1.9e-6)
    # The last of two hosts has four of 12 ranks: the ring still leaves the first.
    incomplete = network_of("infiniband-ndr", 12, 450)
    assert (incomplete.hosts, incomplete.ring_latency(12)) == (2, pytest.approx(10e-6 + 10 * 1.9e-6 + 4e-6))


def test_the_slowest_of_hosts_that_differ_decides_and_is_named():
    slow, fast = network_of("4x12.5", 64, 450), network_of("8x50", 64, 450)
    mixed = network_of("8x50, 4x12.5", 64, 450)
    assert (mixed.ring, mixed.exchange(64)) == (slow.ring, slow.exchange(64))
    assert mixed.ring < fast.ring
    assert str(mixed) == "8 hosts, the slowest of 8x50, 4x12.5: 50 GB/s each way for each host"
    with pytest.raises(UserError, match=r"--network '4y12.5' is neither GB/s"):
        network_of("8x50,4y12.5", 64, 450)


def test_hosts_of_four_gpus_have_twice_as_many_links_between_them():
    eight, four = network_of("infiniband-ndr", 16, 450), network_of("infiniband-ndr", 16, 450, 4)
    assert (eight.hosts, four.hosts) == (2, 4)
    assert (eight.ring, four.ring) == (400e9, 200e9)
    assert network_of(None, 8, 450, 4).hosts == 2


@pytest.mark.parametrize(
    ("ranks", "gpus_per_host", "told"),
    [
        (4, 4, "all 4 ranks are on one host here; remove --network, or give a --gpus-per-host below 4"),
        (4, 8, "all 4 ranks are on one host here; remove --network, or give a --gpus-per-host below 4"),
        (1, None, "1 rank is on one host here; remove --network, or give more --ranks"),
        (1, 8, "1 rank is on one host here; remove --network, or give more --ranks"),
    ],
)
def test_a_network_that_connects_no_hosts_is_refused_with_what_makes_several(ranks, gpus_per_host, told):
    with pytest.raises(UserError, match=f"--network 50 connects hosts, and {told}"):
        network_of("50", ranks, 450, gpus_per_host)
    assert network_of(None, ranks, 450, gpus_per_host).hosts == 1
    assert network_of("50", 4, 450, 3).hosts == 2
