"""Network interfaces: which of this host's addresses gloo takes, and which interface leads to another host."""

import ipaddress
import os
import socket

import psutil

from megagpt.errors import UserError

GLOO = "GLOO_SOCKET_IFNAME"


def gloo_address() -> str:
    """Return the address that gloo takes: of the interface in GLOO_SOCKET_IFNAME, or of this host's own name.

    Raises UserError if there is no such interface.
    """
    if name := os.environ.get(GLOO, "").split(",")[0]:
        if address := interfaces().get(name):
            return address
        raise UserError(
            f"{GLOO}={name}, but {socket.gethostname()} has no such interface with an address, only "
            f"{', '.join(interfaces())}; set {GLOO} to one that all hosts have, in ~/.deepspeed_env"
        )
    try:
        found = socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    return next((str(place[0]) for family, _, _, _, place in found if _is_ours(family, place)), "127.0.0.1")


def listen_for_gloo() -> socket.socket:
    """Listen at gloo's address: hosts that reach this socket will reach gloo. Raises UserError as `gloo_address`."""
    address = gloo_address()
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interfaces() -> dict[str, str]:
    """Return name -> address of the interfaces that have one, IPv4 rather than IPv6."""
    families = (socket.AF_INET6, socket.AF_INET)  # the latter wins
    addresses = [(name, a) for name, all_ in psutil.net_if_addrs().items() for a in all_ if a.family in families]
    return {name: a.address for name, a in sorted(addresses, key=lambda pair: families.index(pair[1].family))}


def interface_to(host: str) -> str:
    """Return the interface through which packets to `host` leave; empty if it cannot be reached."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # UDP: this sends nothing
            ours = probe.getsockname()[0]
    except OSError:
        return ""
    return next((name for name, address in interfaces().items() if address == ours), "")


def interface_advice(host: str) -> str:
    """Return the advice that makes gloo and NCCL take the interface that leads to `host`."""
    name = interface_to(host) or "eth0"
    return f"write {GLOO}={name} and NCCL_SOCKET_IFNAME={name} into ~/.deepspeed_env (or the batch script)"


def _is_ours(family: int, place: tuple[object, ...]) -> bool:
    """Tell whether an address is this host's own, by binding to it, as gloo does."""
    try:
        with socket.socket(family) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True
