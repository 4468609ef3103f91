"""Muon (Jordan et al. 2024) for the matrices inside the blocks, Adam for everything else, at every ZeRO stage.

Muon moves a weight matrix by its momentum after orthogonalization: the matrix of the same singular vectors whose
singular values are all about 1. Each rank keeps its part of the momentum, as it keeps its part of Adam's moments, and
the ranks exchange what an orthogonalization needs whole.

DeepSpeed 0.19.8 has a Muon too. It is not used, because it orthogonalizes while gradients are reduced: clipping, and
the norm that guards judge, are then those of the orthogonalized update, which says nothing about the gradient
(DeepSpeed issue #8439); a step that the guards skip has changed its momentum already; and with fp32 accumulation of
bf16 gradients at stage 1 it makes plain SGD steps. Here the optimizer gets gradients as Adam gets them: averaged,
clipped, and in fp32.

Cost of a step, for N values in matrices on W ranks. Memory: 4 bytes of momentum per value, where Adam has 8. At stages
1 and 2 only a matrix that lies on two ranks or more is sent, at most W - 1 of them. At stage 3 each rank sends and
receives N / W values twice, in bf16 on GPUs. Compute: at most 5 C / t of the step's FLOPs, for a width C and t tokens
per step; at stage 0 every rank does all of it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from megagpt.config.model import ModelConfig
from megagpt.distributed.collectives import exchange, gather_objects
from megagpt.distributed.process_group import rank
from megagpt.engine.cautious import CautiousAdamW, decay_where_it_shrinks
from megagpt.engine.flat_tensors import ParamSlice, own_slices, param_sizes
from megagpt.model.products import add_product, by_onednn, product

# The quintic of Jordan et al. (2024): five rounds bring singular values of 0.01 to 1 to between 0.68 and 1.14.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
# Values that are orthogonalized at a time, which bounds the memory that it takes.
AT_ONCE = 2**25


class Muon(CautiousAdamW):
    """AdamW that updates the groups with a `momentum` by Muon.

    Muon's step is scaled to the size of Adam's, 0.2 per weight (Liu et al. 2025, section 2.2), so that learning rates
    and weight decay of AdamW serve both. The state of its tensors has the names of Adam's, without the second moment.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, cautious: bool = False, **adam: Any) -> None:
        super().__init__(groups, cautious=cautious, **adam)
        self.matrices: dict[Tensor, Matrices] = {}  # `place_matrices` fills it

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all groups. Collective, where a matrix lies on several ranks."""
        groups = self.param_groups
        by_muon = [group for group in groups if "momentum" in group]
        updates = {p: self._update(p, group) for group in by_muon for p in group["params"]}
        if self.matrices:
            self._orthogonalize(updates)
        else:  # DeepSpeed, while it is built, may take a step of zero gradients to allocate the state
            assert not any(update.any() for update in updates.values()), "place_matrices was not called"
        for group in by_muon:
            rate, decay = self.made * group["lr"], self.made * (group["lr"] * group["weight_decay"])
            for p in group["params"]:
                update = updates[p].view_as(p)
                if self.cautious:
                    decay_where_it_shrinks(p, update, decay)
                else:
                    p.mul_(1.0 - decay)
                p.sub_(update.mul_(rate))
        self.step_by_adam([group for group in groups if "momentum" not in group])

    def _update(self, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Add the gradient to the momentum, and return Nesterov's mixture of both, flat; it replaces the gradient."""
        assert p.grad is not None
        state, gradient, skipped = self.state[p], p.grad, self.skipped
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
        momentum = state["exp_avg"]
        if skipped is not None:
            # Averaged with itself, the momentum stays as it is, whatever the gradient.
            gradient.copy_(torch.where(skipped.bool(), momentum, gradient))
        state["step"] += 1.0 if skipped is None else 1.0 - skipped
        momentum.lerp_(gradient, 1.0 - group["momentum"])
        return gradient.lerp_(momentum, group["momentum"]).reshape(-1)

    def _orthogonalize(self, updates: Mapping[Tensor, Tensor]) -> None:
        """Orthogonalize the matrices in these flat tensors, in place."""
        whole = {p: self.matrices[p].collect(update) for p, update in updates.items()}
        orthogonalize([part for p, found in whole.items() for part in self.matrices[p].apart(found)])
        for p, found in whole.items():
            self.matrices[p].distribute(found, updates[p])


@dataclass(frozen=True)
class Matrices:
    """The matrices in one tensor that is updated, and what this rank sends and receives to have some of them whole."""

    shapes: dict[str, torch.Size]
    parts: dict[str, list[int]]  # rows of the matrices that one weight holds below each other
    exchanged: bool  # whether any rank sends something: then all of them take part
    here: list[ParamSlice]  # those that are whole
    sent: list[list[ParamSlice]]  # this rank's slices of the matrices that each rank orthogonalizes
    received: list[list[ParamSlice]]  # each rank's slices of the matrices that this one orthogonalizes

    def collect(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the matrices that this rank orthogonalizes, flat: views, or copies where other ranks have a part."""
        found = {piece.name: _values(flat, piece) for piece in self.here}
        sent = [_values(flat, piece) for piece in _all(self.sent)]
        for piece, values in _exchanged(sent, self.sent, self.received, flat) if self.exchanged else ():
            if piece.name not in found:
                found[piece.name] = values.new_empty(self.shapes[piece.name].numel())
            found[piece.name].narrow(0, piece.start, piece.numel).copy_(values)
        return found

    def distribute(self, found: Mapping[str, Tensor], flat: Tensor) -> None:
        """Write the matrices back to where `collect` took them, on all ranks."""
        own = [found[piece.name].narrow(0, piece.start, piece.numel) for piece in _all(self.received)]
        for piece, values in _exchanged(own, self.received, self.sent, flat) if self.exchanged else ():
            _values(flat, piece).copy_(values)

    def apart(self, found: Mapping[str, Tensor]) -> list[Tensor]:
        """Return them as matrices, several where a layer computes several things at once."""
        return [
            part for name, values in found.items() for part in values.view(self.shapes[name]).split(self.parts[name])
        ]


def place_matrices(engine: Engine, groups: Sequence[dict[str, Any]]) -> None:
    """Tell the optimizer where the matrices lie on all ranks. `groups`: its groups, of the model's own parameters.

    A matrix on several ranks is orthogonalized on one of them, in turn. Collective.
    """
    hidden = [p for group in groups if "momentum" in group for p in group["params"]]
    shapes = {engine.param_names[p]: torch.Size(getattr(p, "ds_shape", p.shape)) for p in hidden}
    parts = {name: fused_rows(name, shape[0], engine.module.cfg) for name, shape in shapes.items()}
    placed = own_slices(engine, param_sizes(engine, groups))
    everyone = gather_objects([[piece for piece in slices if piece.numel] for _, slices in placed])
    for i, (flat, _) in enumerate(placed):
        slices = [of_rank[i] for of_rank in everyone]
        names = dict.fromkeys(piece.name for of_rank in slices for piece in of_rank if piece.name in shapes)
        if names:
            engine.basic_optimizer.matrices[flat] = matrices_of(
                {name: shapes[name] for name in names}, parts, slices, rank()
            )


def fused_rows(name: str, rows: int, cfg: ModelConfig) -> list[int]:
    """Return the rows of each matrix that a weight holds: queries, keys, values; the gate and what it multiplies."""
    if name.endswith("attn.c_attn.weight"):
        return [n_heads * cfg.head_dim for n_heads in (cfg.n_head, cfg.kv_heads, cfg.kv_heads)]
    return [rows // 2, rows // 2] if cfg.gated and name.endswith("mlp.c_fc.weight") else [rows]


def matrices_of(
    shapes: dict[str, torch.Size], parts: dict[str, list[int]], slices: list[list[ParamSlice]], own_rank: int
) -> Matrices:
    """Return the matrices of a rank's flat tensor; `slices` are those of each rank's."""
    whole = {piece.name for piece in _all(slices) if piece.numel == shapes[piece.name].numel()}
    shared = [name for name in shapes if name not in whole]
    owner = {name: i % len(slices) for i, name in enumerate(shared)}
    own = slices[own_rank]
    return Matrices(
        shapes,
        parts,
        exchanged=bool(shared),
        here=[piece for piece in own if piece.name in whole],
        sent=[[piece for piece in own if owner.get(piece.name) == r] for r in range(len(slices))],
        received=[[piece for piece in of_rank if owner.get(piece.name) == own_rank] for of_rank in slices],
    )


def _exchanged(
    values: list[Tensor], sent: list[list[ParamSlice]], received: list[list[ParamSlice]], like: Tensor
) -> list[tuple[ParamSlice, Tensor]]:
    """Return the slices that arrive with their values, for those that are sent with `values`. Collective."""
    flat = torch.cat([piece.to(_dtype(like)) for piece in values] or [like.new_empty(0, dtype=_dtype(like))])
    arrived = exchange(flat, [_numel(pieces) for pieces in sent], [_numel(pieces) for pieces in received])
    return list(zip(_all(received), arrived.split([piece.numel for piece in _all(received)]), strict=True))


def _all(by_rank: list[list[ParamSlice]]) -> list[ParamSlice]:
    return [piece for pieces in by_rank for piece in pieces]


def _numel(pieces: list[ParamSlice]) -> int:
    return sum(piece.numel for piece in pieces)


def _values(flat: Tensor, piece: ParamSlice) -> Tensor:
    return flat.narrow(0, piece.offset, piece.numel)


def _dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of the orthogonalization: Muon is as good in bf16 (Jordan et al. 2024), which CPUs emulate."""
    return torch.bfloat16 if like.is_cuda else torch.float32


def orthogonalize(matrices: Iterable[Tensor]) -> None:
    """Replace each matrix by the nearest one whose singular values are about 0.2 * sqrt(longer side): RMS 0.2.

    Matrices of one shape, or of the transposed one, are computed together.
    """
    alike = defaultdict(list)
    for matrix in matrices:
        wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.mT
        alike[wide.shape].append(wide)
    for (rows, columns), found in alike.items():
        n = max(1, AT_ONCE // (rows * columns))
        for batch in (found[i : i + n] for i in range(0, len(found), n)):
            if by_onednn(batch[0], batch[0]):  # one after another, each stays in the cache
                results = torch.stack([newton_schulz(matrix) for matrix in batch])
            else:
                results = newton_schulz(torch.stack([matrix.to(_dtype(matrix)) for matrix in batch]))
            for matrix, result in zip(batch, results.mul_(0.2 * math.sqrt(columns)), strict=True):
                matrix.copy_(result)


def newton_schulz(x: Tensor) -> Tensor:
    """Bring the singular values of matrices (..., rows <= columns, columns) to about 1 (Jordan et al. 2024)."""
    a, b, c = COEFFICIENTS
    # Singular values are now at most 1. The limit is for zeros alone: gradients of queries and keys begin at 1e-6.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)
    if x.size(-1) >= 2 * x.size(-2) and x.dtype == torch.float32:
        return product(_all_rounds(product(x, x.mT)), x)
    for _ in range(ROUNDS):
        gram = product(x, x.mT)
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a, alpha=1.0)
    return x


def _all_rounds(gram: Tensor) -> Tensor:
    """Return what the rounds multiply matrices x by, from gram = x @ x.mT, without products of x's longer side.

    That takes 5/9 of the time where x is four times as wide as high. In bf16 rounding would make the Gram matrix
    indefinite, and the rounds would enlarge that.
    """
    a, b, c = COEFFICIENTS
    factor = gram
    for i in range(ROUNDS):
        by = add_product(gram, gram, gram, beta=b, alpha=c)
        by.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = by if i == 0 else product(by, factor)
        if i < ROUNDS - 1:
            gram = product(product(by, gram), by)
    return factor


# DeepSpeed warns of an optimizer whose class is not in this list.
ZERO_SUPPORTED_OPTIMIZERS.append(Muon)
