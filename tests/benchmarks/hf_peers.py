"""Hugging Face's peers of throughput.py: GPT2LMHeadModel with our initial weights, in a bare loop and in Trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_peers import autocast_of, loop, update_of
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from turns import BETAS, CLIP, LR, WEIGHT_DECAY, Spec, Turns, our_model

from megagpt.distributed.process_group import world_size
from megagpt.tokenizer.tokenizer import padded_vocab_size


def hf_model(spec: Spec) -> nn.Module:
    sizes = {key: spec.model[key] for key in ("n_layer", "n_head", "n_embd")}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    vocab_size = padded_vocab_size(spec.vocab_size)
    cfg = GPT2Config(vocab_size=vocab_size, n_positions=spec.model["seq_len"], use_cache=False, **sizes, **no_dropout)
    model = GPT2LMHeadModel(cfg)
    transposed = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # its layers are Conv1D, (in, out)
    for name, weight in our_model(spec).state_dict().items():
        theirs = model.get_parameter(name if name.startswith("lm_head") else f"transformer.{name}")
        theirs.data.copy_(weight.T if name.endswith(transposed) else weight)
    return model


def hf(spec: Spec, turns: Turns, device: torch.device, *, compiled: bool = False) -> None:
    """Hugging Face's model in a bare loop."""
    model = hf_model(spec).to(device).train()
    called = torch.compile(model) if compiled else model

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with autocast_of(spec):
            return called(input_ids=x, labels=y, shift_labels=y.contiguous()).loss

    loop(spec, turns, device, loss_of, update_of(model))


def hf_trainer(spec: Spec, turns: Turns, device: torch.device, *, compiled: bool = False) -> None:
    """Hugging Face's Trainer with its own optimizer, at our settings."""
    accumulation = spec.global_batch // world_size() // spec.micro_batch
    share = spec.global_batch // world_size()

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1_000_000 * share

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            row = steps[i // share % len(steps), i % share]
            tokens = torch.from_numpy(row.astype(np.int64))
            return {"input_ids": tokens[:-1], "labels": tokens[1:], "shift_labels": tokens[1:]}

    class Interrupted(Trainer):
        losses: list[Tensor] = []  # noqa: RUF012

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if len(self.losses) % accumulation == 0:
                turns.wait(torch.stack(self.losses).sum() if self.losses else None)
                self.losses = []
            loss = super().training_step(*args, **kwargs).detach()
            self.losses.append(loss)
            return loss

    steps = np.load(Path(spec.folder) / "rows.npy", mmap_mode="r")
    args = TrainingArguments(
        output_dir=str(Path(spec.folder) / spec.name),
        per_device_train_batch_size=spec.micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1_000_000,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        bf16=spec.dtype == "bf16",
        use_cpu=spec.device == "cpu",
        torch_compile=compiled,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=spec.device == "cuda",
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=spec.turn,
        report_to="none",
        disable_tqdm=True,
    )
    Interrupted(model=hf_model(spec), args=args, train_dataset=Samples()).train()
