"""Which host the others wait for: what each rank takes for the same work, compared where steps are logged.

Ranks that train together end each step at the same time, since in the collectives all wait for the slowest. So what is
compared is what stands before them: the wait for data, and the forward passes. Where these hold collectives themselves,
as ZeRO stage 3 gathers weights in them and shared positions are exchanged, only the wait for data is compared.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

SLOWER = 0.3  # than the median rank forward
WAITING = 0.1  # of a step, beyond the median rank's wait for data
WINDOW_STEPS, WINDOW_SECONDS = 10, 5.0  # that are judged together, at least
IN_A_ROW = 3  # windows
HOSTS_DRAWN = 16  # by themselves, with at most so many hosts


class ForwardTimer:
    """How long this rank's forward passes take, by the device's clock, which nothing waits for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - began)

    def lap(self) -> float:
        """Seconds of those since the last lap, each taken for their median, so that a hiccup does not count.

        The device has come to their end, as it has where a loss was read.
        """
        seconds = self._seconds + [begin.elapsed_time(end) / 1000 for begin, end in self._events]
        self._events, self._seconds = [], []
        return median(seconds) * len(seconds)


class StragglerDetector:
    """Compares the ranks of all hosts, and says, once each time, that one has become slow and that it no longer is."""

    def __init__(self, hosts: Sequence[str], *, forward_waits: bool) -> None:
        """`hosts`: each rank's. `forward_waits`: for other ranks, so that forward passes tell nothing."""
        self._forward_waits = forward_waits
        self._ranks = {host: [r for r, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)}
        self._windows = dict.fromkeys(hosts, 0)  # in a row in which a host was not what it is taken for
        self._own, self._wall, self._steps = torch.zeros(len(hosts), 2), 0.0, 0
        self.slow: list[str] = []

    def metrics(self, own: Tensor, n_steps: int) -> dict[str, float]:
        """Seconds of each step. own (world_size, 2): those of n_steps in forward passes, and in waiting for data.

        A host counts as its slowest rank does; nothing is said of a rank that is alone.
        """
        if len(own) == 1:
            return {}
        found = {}
        for i, name in enumerate(("forward", "data")):
            if name == "forward" and self._forward_waits:
                continue
            seconds = own[:, i] / n_steps
            found[f"cluster/{name}_seconds_median"] = float(seconds.median())
            found[f"cluster/{name}_seconds_slowest"] = float(seconds.max())
            found[f"cluster/{name}_slowest_rank"] = float(seconds.argmax())
            for host, ranks in self._ranks.items() if 1 < len(self._ranks) <= HOSTS_DRAWN else ():
                found[f"cluster/{name}_seconds/{host}"] = float(seconds[ranks].max())
        return found

    def judge(self, own: Tensor, wall: float, n_steps: int) -> list[str]:
        """Lines to be said. `own` as above; `wall`: seconds that those steps took."""
        self._own, self._wall, self._steps = self._own + own, self._wall + wall, self._steps + n_steps
        if self._steps < WINDOW_STEPS or self._wall < WINDOW_SECONDS:
            return []
        own, wall, n_steps = self._own, self._wall, self._steps
        self._own, self._wall, self._steps = torch.zeros_like(own), 0.0, 0
        usual = own.median(dim=0).values  # of two ranks the faster one's
        excess = (own[:, 1] - usual[1]) / (WAITING * wall)
        if not self._forward_waits:
            excess = torch.maximum(excess, (own[:, 0] / usual[0] - 1) / SLOWER)
        lines = []
        for host, ranks in self._ranks.items():
            worst = max(ranks, key=lambda r: float(excess[r]))
            other = bool(excess[worst] < 0.5) if host in self.slow else bool(excess[worst] > 1.0)
            self._windows[host] = self._windows[host] + 1 if other else 0
            if self._windows[host] < IN_A_ROW:
                continue
            self._windows[host] = 0
            if host in self.slow:
                self.slow.remove(host)
                lines.append(f"{host} no longer keeps the others waiting")
            else:
                self.slow.append(host)
                why = self._why(own[worst] / n_steps, usual / n_steps, wall / n_steps)
                lines.append(f"all ranks wait for rank {worst} on {host}: {why}")
        return lines

    def _why(self, own: Tensor, usual: Tensor, wall: float) -> str:
        (forward, data), (usual_forward, usual_data) = own.tolist(), usual.tolist()
        passes = f"takes {forward:.3f} s forward, the median rank {usual_forward:.3f} s, and "
        return (
            f"in each step of {wall:.3f} s it {'' if self._forward_waits else passes}waits {data:.3f} s for data, the "
            f"median rank {usual_data:.3f} s; look there for other programs, heat or a slow disk"
        )
