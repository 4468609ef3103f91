"""`megagpt import DIR OUT`: make a folder to begin from out of a Hugging Face folder of a GPT-2, Llama or Qwen3."""

import argparse
import json
from importlib import import_module

from megagpt.config.mistakes import as_written
from megagpt.huggingface.packages import check_installed
from megagpt.model.flops import n_params
from megagpt.terminal import counted, show, typed


def run(args: argparse.Namespace) -> int:
    """Import a model, and print what was imported and how to train it further."""
    check_installed("import", "safetensors", "tokenizers")
    import_folder = import_module("megagpt.huggingface.import_folder").import_folder
    model, tokenizer, notes = import_folder(args.source, args.folder, pickles=args.allow_pickle)
    shape = {key: value for key, value in model.identity().items() if key != "attention"}
    section = json.dumps({"init_from": str(args.folder), "model": shape}, ensure_ascii=False)
    keys = " ".join(f"megagpt.model.{name}={as_written(value)}" for name, value in shape.items())
    out = typed(args.folder)
    show(
        f"{args.folder} holds the model of {args.source}: {n_params(model, tokenizer.vocab_size):,} parameters "
        f"({counted(model.n_layer, 'layer')}, {model.n_embd} wide), {tokenizer.vocab_size:,} tokens"
    )
    for note in notes:
        show(note)
    show(
        "to train it further, build data with its tokenizer:\n"
        f"  python -m data_tools build --input TEXTS --out data/mine tokenizer={out}\n"
        f'and have this in the run file\'s section "megagpt": {section[1:-1]}\n'
        f"or on the command line: megagpt train RUN.json megagpt.init_from={out} {keys} megagpt.out_dir=runs/mine\n"
        "set a lower optimizer.params.lr than the model was trained with, after a warm-up"
    )
    return 0
