"""`megagpt generate CKPT`: generate text from a checkpoint."""

import argparse

import torch
from pydantic import ValidationError

from megagpt.checkpoint.load import load_model
from megagpt.config.schema import GenerationConfig
from megagpt.errors import UserError
from megagpt.model.generate import complete


def run(args: argparse.Namespace) -> int:
    """Print one or more texts for each prompt. Raises UserError for an option out of range."""
    try:
        cfg = GenerationConfig(
            prompts=tuple(args.prompt or [""]),
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"--{str(wrong['loc'][0]).replace('_', '-')}={wrong['input']}: {wrong['msg']}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, *_ = load_model(args.checkpoint, device)
    for text in complete(model, tokenizer, cfg.prompts, cfg, batch=args.batch, seed=args.seed):
        print(text, end="\n---\n")
    return 0
