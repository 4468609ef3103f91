"""The gradient noise scale (McCandlish et al. 2018): the batch up to which more sequences make a step that much better.

It is the variance of one sequence's gradient over the square of the mean gradient. At a batch of that size a step makes
half of the progress of the exact gradient; far below it, half of the batch takes twice the steps, far above it, almost
as many.
"""

from torch import Tensor


def noise_scale(small: Tensor, big: Tensor, n_small: int, n_big: Tensor) -> float | None:
    """Return the simple noise scale in sequences (appendix A.1), or None where the norms of these steps give none.

    `small` and `big` are squared gradient norms (steps,) over `n_small` and `n_big` (steps,) sequences. What they
    estimate is averaged over the steps before the division; single estimates may be negative. Steps of `n_small`
    sequences tell nothing.
    """
    sound = small.isfinite() & big.isfinite() & (n_big != n_small)
    small, big, n_big = small[sound], big[sound], n_big[sound]
    if not len(small):
        return None
    gradient = ((n_big * big - n_small * small) / (n_big - n_small)).mean()
    variance = ((small - big) / (1 / n_small - 1 / n_big)).mean()
    return (variance / gradient).item() if gradient > 0 and variance > 0 else None
