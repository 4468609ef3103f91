"""Read which network cards this host has and how fast their links are, from what Linux shows in /sys/class."""

from collections.abc import Iterator
from pathlib import Path

SYS_CLASS = Path("/sys/class")


def network_cards(shown: Path = SYS_CLASS) -> str:
    """Name the fastest cards with a link, such as `8 x 400 Gbit/s InfiniBand`; "unknown" if no card tells its speed.

    NCCL takes InfiniBand and RoCE cards where there are any; a slower card beside them, for ssh, does not count.
    """
    for kind, speeds in (("InfiniBand", list(_infiniband(shown))), ("Ethernet", list(_ethernet(shown)))):
        if speeds:
            fastest = max(speeds)
            return f"{speeds.count(fastest)} x {fastest:g} Gbit/s {kind}"
    return "unknown"


def _infiniband(shown: Path) -> Iterator[float]:
    """Yield the Gbit/s of each port that is up; a RoCE card shows itself like an InfiniBand card."""
    for port in sorted(shown.glob("infiniband/*/ports/*")):
        state, rate = _read(port / "state"), _read(port / "rate")  # "4: ACTIVE", "400 Gb/sec (4X NDR)"
        if state.endswith("ACTIVE") and (number := _number(rate.partition(" ")[0])) > 0:
            yield number


def _ethernet(shown: Path) -> Iterator[float]:
    """Yield the Gbit/s of each interface that a device is behind; bridges and tunnels have none."""
    for interface in sorted(shown.glob("net/*")):
        # Mbit/s; -1, or an error, without a link.
        if (interface / "device").exists() and (number := _number(_read(interface / "speed"))) > 0:
            yield number / 1000


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
