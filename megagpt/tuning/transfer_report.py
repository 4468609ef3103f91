"""Tables and sentences of `megagpt tune --transfer`, from what was measured and nothing else."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt import __version__
from megagpt.tuning.widths import exponent, lowest

Sizes = Mapping[str, Sequence[float]]  # activation -> mean |x|, mean |change|


@dataclass
class Measured:
    """The results of the short runs of one optimizer, narrowest width first."""

    optimizer: str
    key: str  # of the rate that is compared
    rate: float  # its value in the run file
    widths: list[int] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)
    losses: list[dict[int, float]] = field(default_factory=list)  # by doublings of the rate

    def add(self, width: int, sizes: Sizes, losses: dict[int, float]) -> None:
        """Add a width."""
        self.widths.append(width)
        self.sizes.append(sizes)
        self.losses.append(losses)

    def best(self, i: int) -> int:
        """Return the doublings of the rate with the lowest loss at width number `i`."""
        return min(self.losses[i], key=lambda doublings: self.losses[i][doublings])

    def rate_at(self, doublings: float) -> float:
        """Return a rate."""
        return float(self.rate * 2.0**doublings)

    @property
    def best_rates(self) -> list[float]:
        """The best rate of each width, between those that were tried."""
        return [self.rate_at(lowest(losses)) for losses in self.losses]

    @property
    def cost(self) -> float:
        """The loss at full width with the narrowest model's best rate, less the best loss there, in nats."""
        return self.losses[-1][self.best(0)] - self.losses[-1][self.best(-1)]

    def progress(self) -> str:
        """Return a line on the last width."""
        best, losses = self.best(-1), self.losses[-1]
        return (
            f"{self.optimizer}, {self.widths[-1]} wide: best of {len(losses)} rates {self.key}={self.rate_at(best):.3g}"
            f", val/loss {losses[best]:.4f}"
        )


def tables(found: Sequence[Measured], steps: int, checked: int) -> list[str]:
    """Return the lines of both tables: sizes of activations by width, and best rates by width."""
    widths = found[0].widths
    head = "".join(f"{f'{width} wide':>19}" for width in widths)
    lines = [
        f"mean |x| after {checked} steps at the run file's rates (in brackets: mean |change|), as powers of the width",
        f"{'':<20}{head}{'width^':>18}",
    ]
    for one in found:
        for name in _shown(list(one.sizes[0])):
            values = [sizes[name] for sizes in one.sizes]
            powers = [_power(widths, [value[i] for value in values]) for i in (0, 1)]
            cells = "".join(f"{f'{size:.3g} ({change:.3g})':>19}" for size, change in values)
            lines.append(f"{one.optimizer:<7}{name:<13}{cells}{f'{powers[0]} ({powers[1]})':>18}")
    lines += ["", f"best rates: val/loss after {steps} steps that decay to 0, of rates in factors of 2"]
    lines.append(f"{'':<9}{'wide':>6}{'rate':>10}{'val/loss':>10}{'at half':>10}{'at twice':>10}{'tried':>7}")
    for one in found:
        for i, (width, losses) in enumerate(zip(one.widths, one.losses, strict=True)):
            best = one.best(i)
            around = "".join(f"{_loss(losses.get(n)):>10}" for n in (best, best - 1, best + 1))
            lines.append(f"{one.optimizer:<9}{width:>6}{one.best_rates[i]:>10.3g}{around}{len(losses):>7}")
    return lines


def told(found: Sequence[Measured], steps: int) -> str:
    """Return what was measured about moving rates, and what it means for tuning a narrower model."""
    widths = ", ".join(map(str, found[0].widths))
    return " ".join(
        [
            *map(_moved, found),
            f"Measured with one seed, {steps} steps of this run file's data and widths of {widths}: longer runs, other "
            "depths and wider models were not.",
        ]
    )


def _moved(one: Measured) -> str:
    narrow, wide = one.widths[0], one.widths[-1]
    rates, first = one.best_rates, one.best(0)
    logits = _power(one.widths, [sizes["logits"][1] for sizes in one.sizes])
    text = f"{one.optimizer}: at one rate the change of the logits grows as width^{logits}. "
    if any(_at_the_edge(losses, one.best(i)) for i, losses in enumerate(one.losses)):
        return text + f"No best {one.key} was found between worse ones, so nothing can be said about moving it."
    text += (
        f"The best {one.key} is {rates[0]:.2g} at {narrow} and {rates[-1]:.2g} at {wide}, a factor of "
        f"{rates[-1] / rates[0]:.2f} (width^{exponent(one.widths, rates):.2f}). "
    )
    if one.best(-1) == first:
        return text + f"Of the rates tried the same one is best at both: tuned at {narrow}, it served {wide} as it is."
    text += (
        f"{wide} with the rate that was best of those tried at {narrow}, {one.rate_at(first):.2g}, ends "
        f"{_loss(one.cost)} nats above its best: "
    )
    if abs(math.log2(rates[-1] / rates[0])) < 0.5:
        return text + "but the two are closer than the rates tried, a factor of 2, can tell apart."
    return text + (
        f"here {wide} was best at {rates[-1] / rates[0]:.2f} times the rate of {narrow}; repeat it with another "
        "megagpt.seed before relying on a small difference."
    )


def as_json(found: Sequence[Measured], run_file: Path, *, steps: int, checked: int, text: str) -> dict[str, Any]:
    """Return all that was measured, with null for what is not finite."""
    optimizers = {
        one.optimizer: {
            "key": one.key,
            "best_rate": dict(zip(map(str, one.widths), one.best_rates, strict=True)),
            "width_exponent": _finite(exponent(one.widths, one.best_rates)),
            "cost_of_narrow_rate": _finite(one.cost),
            "val_loss": {
                str(width): {f"{one.rate_at(i):.6g}": _finite(losses[i]) for i in sorted(losses)}
                for width, losses in zip(one.widths, one.losses, strict=True)
            },
            "mean_size_and_change": {
                str(width): {name: list(map(_finite, pair)) for name, pair in sizes.items()}
                for width, sizes in zip(one.widths, one.sizes, strict=True)
            },
        }
        for one in found
    }
    about = {"version": __version__, "run_file": str(run_file), "steps": steps, "steps_of_sizes": checked}
    return {**about, "widths": found[0].widths, "optimizers": optimizers, "told": text}


def _shown(names: list[str]) -> list[str]:
    """Return the first block, the middle one, the last, and the logits."""
    blocks = names[:-1]
    return [*dict.fromkeys((blocks[0], blocks[len(blocks) // 2], blocks[-1])), names[-1]]


def _at_the_edge(losses: Mapping[int, float], best: int) -> bool:
    return not math.isfinite(losses[best]) or best - 1 not in losses or best + 1 not in losses


def _power(widths: Sequence[int], sizes: Sequence[float]) -> str:
    found = exponent(widths, sizes)
    return f"{found:.2f}" if math.isfinite(found) else "-"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
