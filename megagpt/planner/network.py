"""The links between the ranks of a plan: what NCCL's rings carry over them, and how long one collective takes to start.

W ranks on H hosts with G GPUs each.
"""

import math
import re
from dataclasses import dataclass, replace

from megagpt.errors import UserError

GPUS_PER_HOST = 8
# GB/s of one network card, each way, and whether each GPU has one: else a host has one.
CARDS = {
    "infiniband-ndr": (50.0, True),  # 400 Gbit/s
    "infiniband-hdr": (25.0, True),  # 200 Gbit/s
    "ethernet-100": (12.5, False),
    "ethernet-25": (3.125, False),
    "ethernet-10": (1.25, False),
}
# GB/s below which a link is PCI Express: NVLink and Infinity Fabric have more.
PCI_EXPRESS = 64.0
# Seconds of NCCL's own model of a ring (protocol LL128) and a tree: to begin, and for each hop inside a host and
# between hosts (NVIDIA's nccl, src/graph/tuning.cc: baseLat, hwLat).
RING_BASE, RING_NVLINK, RING_PCI, RING_NETWORK = 10e-6, 1.9e-6, 2.5e-6, 4.0e-6
TREE_BASE, TREE_NVLINK, TREE_PCI, TREE_NETWORK = 4.4e-6, 1.2e-6, 1.9e-6, 8.5e-6


@dataclass(frozen=True)
class Network:
    """Hosts of equal GPUs and network cards; GB/s are each way."""

    name: str
    ranks: int
    ranks_per_host: int
    link_gb_s: float  # of one GPU to those of its host
    host_gb_s: float  # of all network cards of a host together; no limit where there is one host

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return math.ceil(self.ranks / self.ranks_per_host)

    @property
    def ring(self) -> float:
        """Bytes/s that each rank sends to the next of a ring.

        NCCL closes as many rings over all ranks as there are network cards, and each leaves a host once: a rank sends
        at the speed of all cards of its host, or of its link if that is less (NVIDIA's nccl-tests, doc/PERFORMANCE.md).
        """
        return 1e9 * (self.link_gb_s if self.hosts == 1 else min(self.link_gb_s, self.host_gb_s))

    def exchange(self, size: int) -> float:
        """Bytes/s of each rank in an all-to-all of `size` ranks, where each has its share of the network cards."""
        return 1e9 * (self.link_gb_s if size <= self.ranks_per_host else self.host_gb_s / self.ranks_per_host)

    def ring_latency(self, size: int) -> float:
        """Seconds of the hops of an all-gather or a reduce-scatter over `size` ranks, next to each other."""
        between = math.ceil(size / self.ranks_per_host) - 1
        inside = RING_PCI if self.link_gb_s <= PCI_EXPRESS else RING_NVLINK
        return RING_BASE + (size - 1 - between) * inside + between * RING_NETWORK

    @property
    def tree_latency(self) -> float:
        """Seconds of the hops of an all-reduce over all ranks: a chain in each host and a tree of the hosts."""
        inside = TREE_PCI if self.link_gb_s <= PCI_EXPRESS else TREE_NVLINK
        chain = min(self.ranks, self.ranks_per_host) - 1
        return TREE_BASE + 2 * (chain * inside + math.ceil(math.log2(self.hosts)) * TREE_NETWORK)

    def __str__(self) -> str:
        """Say what connects the ranks."""
        if self.hosts == 1:
            return f"one host, {self.link_gb_s:g} GB/s each way for each GPU"
        return f"{self.hosts:,} hosts, {self.name}: {self.host_gb_s:g} GB/s each way for each host"


def network_of(given: str | None, ranks: int, link_gb_s: float, gpus_per_host: int | None = None) -> Network:
    """Return the network of the command line's name or speed. Raises UserError for what is neither.

    A number is the GB/s of each GPU, and `4x12.5` four cards of 12.5 GB/s in each host; of several, for hosts that
    differ, it is the slowest. Without any, up to 8 ranks are one host; with one, up to 8 ranks are hosts of one GPU.
    """
    if gpus_per_host is None:
        one_host = given is None and ranks <= GPUS_PER_HOST
        gpus_per_host = ranks if one_host else GPUS_PER_HOST if ranks > GPUS_PER_HOST else 1
    names = [name.strip() for name in (given or "infiniband-ndr").split(",")]
    slowest = min((_of_one(name, ranks, link_gb_s, gpus_per_host) for name in names), key=lambda n: n.host_gb_s)
    if ranks <= gpus_per_host:
        if given is not None:
            on_one, other = "1 rank is", "more --ranks"
            if ranks > 1:
                on_one, other = f"all {ranks} ranks are", f"a --gpus-per-host below {ranks}"
            raise UserError(
                f"--network {given} connects hosts, and {on_one} on one host here; remove --network, or give {other}"
            )
        return Network("the GPUs' own links", ranks, ranks, link_gb_s, link_gb_s)
    return slowest if len(names) == 1 else replace(slowest, name=f"the slowest of {', '.join(names)}")


def _of_one(name: str, ranks: int, link_gb_s: float, per_host: int) -> Network:
    if name in CARDS:
        speed, for_each_gpu = CARDS[name]
        return Network(name, ranks, per_host, link_gb_s, speed * (per_host if for_each_gpu else 1))
    cards, speed = _cards_and_speed(name)
    if not (0.001 <= speed <= 1e6 and (cards is None or 1 <= cards <= 1000)):
        raise UserError(
            f"--network {name!r} is neither GB/s of each GPU, nor cards of each host (4x12.5: 4 of 12.5 GB/s), nor one "
            f"of {', '.join(CARDS)}; give a name, or a number from 0.001 to 1e6"
        )
    return Network("network", ranks, per_host, link_gb_s, speed * (per_host if cards is None else cards))


def _cards_and_speed(given: str) -> tuple[int | None, float]:
    """Split `4x12.5` into 4 and 12.5, and `50` into None and 50; a speed of 0 is none."""
    cards = re.fullmatch(r"(\d{1,4})x(.+)", given)
    try:
        return (int(cards[1]), float(cards[2])) if cards else (None, float(given))
    except ValueError:
        return None, 0.0
