"""Find stragglers: hosts that slow every step, by comparing the time that each rank takes for the same work.

Ranks end each step at the same time, because in the collectives all wait for the slowest. So the parts before them are
compared: the wait for data, and the forward passes. Where forward passes contain collectives themselves (ZeRO stage 3
gathers weights in them, sequence parallelism exchanges positions), only the wait for data is compared.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

# A rank is a straggler if its forward passes take 30 % longer than the median rank's, ...
SLOWER = 0.3
# ... or if it waits for data longer than the median rank, by a tenth of the step.
WAITING = 0.1
WINDOW_STEPS, WINDOW_SECONDS = 10, 5.0  # judged together, at least
IN_A_ROW = 3  # windows that must agree
HOSTS_DRAWN = 16  # TensorBoard gets a curve for each host up to this many hosts


class ForwardTimer:
    """Measures this rank's forward passes by the device's clock, without waiting for the device."""

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
        """Return the seconds of the passes since the last lap, each counted as their median to ignore hiccups.

        The device must have finished them, as it has once a later loss was read.
        """
        seconds = self._seconds + [begin.elapsed_time(end) / 1000 for begin, end in self._events]
        self._events, self._seconds = [], []
        return median(seconds) * len(seconds)


class StragglerDetector:
    """Compares the ranks of all hosts; reports when a host becomes a straggler, and when it no longer is one."""

    def __init__(self, hosts: Sequence[str], *, forward_waits: bool) -> None:
        """`hosts`: the host of each rank. `forward_waits`: forward passes contain collectives, so are not compared."""
        self._forward_waits = forward_waits
        self._ranks = {host: [r for r, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)}
        self._windows = dict.fromkeys(hosts, 0)  # in a row that contradict a host's present status
        self._own, self._wall, self._steps = torch.zeros(len(hosts), 2), 0.0, 0
        self.slow: list[str] = []

    def metrics(self, own: Tensor, n_steps: int) -> dict[str, float]:
        """Return seconds per step. own (world_size, 2): seconds of n_steps in forward passes, and in waiting for data.

        A host counts as its slowest rank. A single rank has nothing to compare with: no metrics.
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
        """Return the lines to print. `own` as for `metrics`; `wall`: seconds that those steps took."""
        self._own, self._wall, self._steps = self._own + own, self._wall + wall, self._steps + n_steps
        if self._steps < WINDOW_STEPS or self._wall < WINDOW_SECONDS:
            return []
        own, wall, n_steps = self._own, self._wall, self._steps
        self._own, self._wall, self._steps = torch.zeros_like(own), 0.0, 0
        usual = own.median(dim=0).values  # torch's median of two values is the smaller one
        excess = (own[:, 1] - usual[1]) / (WAITING * wall)
        if not self._forward_waits:
            excess = torch.maximum(excess, (own[:, 0] / usual[0] - 1) / SLOWER)
        lines = []
        for host, ranks in self._ranks.items():
            worst = max(ranks, key=lambda r: float(excess[r]))
            changed = bool(excess[worst] < 0.5) if host in self.slow else bool(excess[worst] > 1.0)
            self._windows[host] = self._windows[host] + 1 if changed else 0
            if self._windows[host] < IN_A_ROW:
                continue
            self._windows[host] = 0
            if host in self.slow:
                self.slow.remove(host)
                lines.append(f"{host} is no longer a straggler")
            else:
                self.slow.append(host)
                why = self._why(own[worst] / n_steps, usual / n_steps, wall / n_steps)
                lines.append(f"straggler: rank {worst} on {host} slows every step: {why}")
        return lines

    def _why(self, own: Tensor, usual: Tensor, wall: float) -> str:
        (forward, data), (usual_forward, usual_data) = own.tolist(), usual.tolist()
        passes = f"takes {forward:.3f} s for its forward passes (median rank: {usual_forward:.3f} s) and "
        return (
            f"in a step of {wall:.3f} s it {'' if self._forward_waits else passes}waits {data:.3f} s for data "
            f"(median rank: {usual_data:.3f} s); look there for other programs, heat or a slow disk"
        )
