"""Peers of throughput.py that are plain PyTorch loops: our model without DeepSpeed, and GPT-2 as one writes it down."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

import torch
from plain_gpt2 import PlainGPT2
from torch import Tensor, nn
from turns import BETAS, CLIP, LR, WEIGHT_DECAY, Spec, Turns, my_rows, our_model

from megagpt.config.model import ModelConfig
from megagpt.distributed.process_group import world_size
from megagpt.engine.compilation import compile_blocks, compiles
from megagpt.engine.optimizer import decay_groups
from megagpt.model.attention import prefer_cudnn
from megagpt.model.loss import next_token_score
from megagpt.tokenizer.tokenizer import padded_vocab_size


def loop(
    spec: Spec,
    turns: Turns,
    device: torch.device,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    update: Callable[[], None],
) -> NoReturn:
    """What one writes by hand: accumulate over the micro-batches, then update. The tokens lie ready in memory."""
    share = spec.global_batch // world_size()
    accumulation, loss, step = share // spec.micro_batch, None, 0
    while True:
        turns.wait(loss)
        losses = []
        for rows in my_rows(spec, step).split(spec.micro_batch):
            rows = rows.to(device, non_blocking=True)
            losses.append(loss_of(rows[:, :-1], rows[:, 1:]))
            (losses[-1] / accumulation).backward()
        update()
        loss, step = torch.stack(losses).detach().mean(), step + 1


def update_of(model: nn.Module, *, foreach: bool = False) -> Callable[[], None]:
    """Clip and AdamW. A bf16 model has fp32 masters, as in DeepSpeed's bf16 mode."""
    groups = decay_groups(model, WEIGHT_DECAY)
    working = [p for group in groups for p in group["params"]]
    masters = {p: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in working}
    for group in groups:
        group["params"] = [masters[p] for p in group["params"]]
    kernel = {"foreach": True} if foreach else {"fused": True}
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, **kernel)
    apart = [(p, master) for p, master in masters.items() if master is not p]

    def update() -> None:
        for p, master in apart:
            master.grad = p.grad.float()
        nn.utils.clip_grad_norm_(masters.values(), CLIP)
        optimizer.step()
        if apart:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in apart], [master for _, master in apart])
        for p in (*working, *masters.values()):
            p.grad = None

    return update


def plain(spec: Spec, turns: Turns, device: torch.device, *, ddp: bool = False) -> None:
    """Our model and loss without DeepSpeed, compiled where ours is."""
    gpt, compiled = our_model(spec), compiles(None, device)
    if compiled:
        compile_blocks(gpt, Path(spec.folder) / spec.name / "compiled")
    prefer_cudnn(device)
    model: nn.Module = gpt.to(device, spec.torch_dtype)
    update = update_of(model)
    if ddp:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    loop(spec, turns, device, lambda x, y: model(x, score=next_token_score(y, compiled=compiled)), update)


def gpt2(spec: Spec, turns: Turns, device: torch.device, *, fp32: bool = False, compiled: bool = False) -> None:
    """A plain GPT-2; fp32 is with the foreach AdamW, otherwise autocast and the fused one."""
    model = PlainGPT2(ModelConfig(**spec.model), padded_vocab_size(spec.vocab_size))
    model.load_state_dict(our_model(spec).state_dict())
    model.to(device)
    autocast = nullcontext() if fp32 else autocast_of(spec)
    called = torch.compile(model) if compiled else model

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with autocast:
            return called(x, y)

    loop(spec, turns, device, loss_of, update_of(model, foreach=fp32))


def autocast_of(spec: Spec) -> AbstractContextManager[None]:
    return torch.autocast(spec.device, torch.bfloat16, enabled=spec.dtype == "bf16")
