"""Narrower models of a run file's model, and the search for the best learning rate of each: the arithmetic alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from megagpt.config.model import ModelConfig
from megagpt.errors import UserError

SHARES = (0.25, 0.5, 1.0)  # of the width
FARTHEST = 8  # factors of 2 between the run file's rate and the last that is tried


def three_widths(model: ModelConfig) -> list[list[str]]:
    """Return the keys of a quarter, a half and all of a model's width, narrowest first: whole heads of one size.

    Raises UserError for a model that has too few heads.
    """
    heads = sorted({max(1, round(share * model.n_head)) for share in SHARES})
    if len(heads) < len(SHARES):
        raise UserError(
            f"--transfer compares three widths in whole heads of {model.head_dim}, and megagpt.model.n_head="
            f"{model.n_head} leaves no two narrower ones; set megagpt.model.n_head to 4 or more, or search at this "
            "width by --space"
        )
    return [_keys(model, n_head) for n_head in heads]


def _keys(model: ModelConfig, n_head: int) -> list[str]:
    keys = {"n_embd": n_head * model.head_dim, "n_head": n_head}
    if model.n_kv_head is not None:  # about as many heads of queries for each as there are
        wanted = max(1, round(model.n_kv_head * n_head / model.n_head))
        keys["n_kv_head"] = max(n for n in range(1, wanted + 1) if n_head % n == 0)
    if model.mlp_width is not None:
        keys["mlp_width"] = max(1, round(model.mlp_width * n_head / model.n_head))
    return [f"megagpt.model.{key}={value}" for key, value in keys.items()]


def search(loss_at: Callable[[int], float], start: int, also: Iterable[int] = ()) -> dict[int, float]:
    """Return losses by the number of doublings of a rate: of the best, and of those on both of its sides.

    A search downhill from `start`, its neighbors and what is `also` tried. The best is only then without a neighbor if
    that would be more than FARTHEST doublings away.
    """
    losses = {i: loss_at(i) for i in dict.fromkeys((start, start - 1, start + 1, *also)) if abs(i) <= FARTHEST}
    while True:
        best = min(losses, key=lambda i: losses[i])
        new = [i for i in (best - 1, best + 1) if i not in losses and abs(i) <= FARTHEST]
        if not new:
            return losses
        losses[new[0]] = loss_at(new[0])


def lowest(losses: Mapping[int, float]) -> float:
    """Return where the loss is lowest, in doublings: the lowest point of the parabola through the best three."""
    best = min(losses, key=lambda i: losses[i])
    low, mid, high = losses.get(best - 1, math.inf), losses[best], losses.get(best + 1, math.inf)
    if not all(map(math.isfinite, (low, mid, high))) or low + high <= 2 * mid:
        return float(best)
    return best + 0.5 * (low - high) / (low - 2 * mid + high)


def exponent(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Return a of the power law, size = c * width^a, that fits best over logarithms; NaN for sizes that have none."""
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return math.nan
    x, y = [math.log(width) for width in widths], [math.log(size) for size in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)
