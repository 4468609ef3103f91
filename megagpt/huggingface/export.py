"""Write a committed step as a Hugging Face folder, which appears once transformers has found equal logits in it."""

import json
import math
import random
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from megagpt.checkpoint.load import LoadedModel
from megagpt.config.regularization import RegularizationConfig
from megagpt.config.validation_sets import sets_of
from megagpt.data.dataset import open_dataset
from megagpt.errors import UserError
from megagpt.huggingface.card import model_card, write_curves
from megagpt.huggingface.fast_tokenizer import exported_json, write_tokenizer
from megagpt.huggingface.weights import DTYPES, class_of, config_json, renamed, write_weights
from megagpt.new_folder import check_free, new_folder
from megagpt.tokenizer.tokenizer import Tokenizer

# Of a logit in fp32, where none is above 10; the rounding of larger ones is larger.
TOLERANCE = 1e-4
WINDOWS, LINES = 4, 10_000
WINDOW = 512  # positions: the logits of all of a long context's would fill the memory
PRIVATE = ("wandb", "comet", "tensorboard", "csv_monitor")  # names of accounts and folders
LICENSE = re.compile(r"[\w.+-]+")
ODD = [  # what tokenizers stumble over: their own names, marks that join or reverse, control characters, ties
    *("\u2581", "<s>", "</s>", "<unk>", "<0x41>", "\x00", "\r\n", "\t", "\n", " ", "   ", "\u00a0", "\u200d"),
    *("e\u0301", "\U0001f469\u200d\U0001f680", "\ufeff", "\u202e", "\U0010ffff", "#" * 40, "=" * 37, "0" * 33),
]


class Exported(NamedTuple):
    """Holds what the comparison with transformers found."""

    largest: float  # difference of a logit
    lines: int
    ties: int  # lines that are cut into other tokens of the same probability


def export(loaded: LoadedModel, folder: Path, *, dtype: str, license_name: str | None) -> Exported:
    """Write the folder, which must be new or empty. Raises UserError; nothing is left behind then."""
    check_free(folder)
    if license_name is not None and not LICENSE.fullmatch(license_name):
        raise UserError(f"--license {license_name!r:.60} is no name of a license; give one such as apache-2.0")
    tokenizer, cfg = loaded.tokenizer, loaded.model.cfg
    class_of(cfg)  # before anything that takes time
    tokenizer_json = exported_json(tokenizer)
    _round(loaded, dtype)
    run_file = json.loads((loaded.step_dir / "run.json").read_bytes())
    dropout = RegularizationConfig(**run_file["megagpt"].get("regularization", {})).dropouts
    with new_folder(folder) as partial:
        write_weights(renamed(loaded.model.state_dict(), cfg, tokenizer.vocab_size), partial, DTYPES[dtype])
        config = config_json(cfg, tokenizer.vocab_size, tokenizer.eod_id, dropout, dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        ends = {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.eod_id}
        (partial / "generation_config.json").write_text(json.dumps(ends | {"do_sample": True, "top_k": 50}, indent=2))
        write_tokenizer(tokenizer_json, tokenizer, cfg.seq_len, partial)
        public = {key: value for key, value in run_file.items() if key not in PRIVATE}
        public["megagpt"] = {key: value for key, value in run_file["megagpt"].items() if key != "mlflow"}
        (partial / "megagpt_run.json").write_text(json.dumps(public, indent=1))
        found = _compared(loaded, partial, run_file)
        drawn = write_curves(loaded.step_dir, partial)
        card = model_card(loaded, folder.name, license_name, found.lines, found.ties, drawn=drawn)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return found


@torch.no_grad()
def _round(loaded: LoadedModel, dtype: str) -> None:
    """Give the model the weights that the folder will have, in fp32, so that logits can be compared."""
    for weight in loaded.model.parameters():
        weight.copy_(weight.to(DTYPES[dtype]))


def _compared(loaded: LoadedModel, partial: Path, run_file: dict[str, Any]) -> Exported:
    """Load the folder with transformers in a process of its own. Raises UserError unless it is the same model."""
    lines = _lines(loaded.tokenizer, run_file)
    encoded = [ids.tolist() for ids in loaded.tokenizer.encode_batch(lines)]
    with tempfile.TemporaryDirectory() as name:
        expected = Path(name)
        save_file(windows := _windows(loaded), expected / "logits.safetensors")
        (expected / "lines.json").write_text(json.dumps(list(zip(lines, encoded, strict=True))))
        command = [sys.executable, "-m", "megagpt.huggingface.check", str(partial), str(expected)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise UserError(f"transformers cannot load the export: {done.stderr[-1000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["allowed"] = TOLERANCE * max(1.0, windows["logits"].abs().max().item() / 10)
    if not found["largest"] <= found["allowed"] or found["tied"] != loaded.model.cfg.tied or found["not_as_written"]:
        raise UserError(
            f"transformers loads another model than was exported: a logit differs by {found['largest']:.2g}, where "
            f"{found['allowed']:.2g} is allowed, tied={found['tied']}, tensors {found['not_as_written']}; report it"
        )
    for i, ids in found["differing"]:
        if not equally_likely(loaded.tokenizer, encoded[i], ids):
            raise UserError(f"the exported tokenizer cuts {lines[i]!r:.60} into other tokens; please report it")
    return Exported(found["largest"], len(lines), len(found["differing"]))


def equally_likely(tokenizer: Tokenizer, ids: list[int], others: list[int]) -> bool:
    """Tell whether two segmentations are of one text and of one probability, but for rounding in 32 bits."""
    if tokenizer.kind != "unigram" or tokenizer.decode(ids) != tokenizer.decode(others):
        return False
    one, other = (sum(map(tokenizer.score, part)) for part in (ids, others))
    return math.isclose(one, other, rel_tol=1e-5)


def _windows(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Return windows of random tokens, and the model's logits for them."""
    generator = torch.Generator().manual_seed(0)
    shape = (WINDOWS, min(WINDOW, loaded.model.cfg.seq_len))
    windows = torch.randint(loaded.tokenizer.vocab_size, shape, generator=generator)
    with torch.no_grad():
        logits = [loaded.model(window.unsqueeze(0))[0, :, : loaded.tokenizer.vocab_size] for window in windows]
    return {"windows": windows, "logits": torch.stack(logits).contiguous()}


def _lines(tokenizer: Tokenizer, run_file: dict[str, Any]) -> list[str]:
    """Return lines of the validation data, if it is still there, and lines of what tokenizers stumble over."""
    lines = []
    with suppress(UserError, KeyError, OSError):  # the data may be gone, or elsewhere
        stream = open_dataset(Path(next(iter(sets_of(run_file["megagpt"]).values()))["path"])).stream("val")
        tokens = np.empty(min(stream.n_tokens, 40 * LINES), np.int64)
        stream.copy(0, tokens)
        lines = list(islice(tokenizer.decode(tokens).splitlines(keepends=True), LINES // 2))
    rng = random.Random(0)
    spelled = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    while len(lines) < LINES:
        parts = rng.choices([*ODD, chr(rng.randrange(1, 0xD800)), chr(rng.randrange(0x10000, 0x110000))], k=3)
        parts += rng.choices(spelled, k=rng.randrange(20))
        rng.shuffle(parts)
        lines.append("".join(parts))
    # the package reads a control token's name as that token where a Unigram model has a piece of this name
    controls = [name for name in map(tokenizer.names().__getitem__, tokenizer.control_ids()) if name]
    reads_names = tokenizer.kind == "Hugging Face Unigram"
    return [line for line in lines if not (reads_names and any(name in line for name in controls))]
