"""A folder with the weights of a model and nothing else of a run, which `megagpt import` and `average` write.

It is a step's folder of ZeRO stage 0 on one rank without an optimizer's state, so all that reads the model of a step
reads it: init_from, generate, evaluate, export and megagpt.load. No run resumes from it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megagpt.checkpoint.commit import write_commit, write_rank_manifest
from megagpt.checkpoint.identity import Identity
from megagpt.checkpoint.save import write_state
from megagpt.data.mixture import Mixture
from megagpt.new_folder import new_folder
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.train_state import TrainState

ORIGIN = "weights_from.json"  # such a folder's kind, and what it was made from


def write_weights_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    model: Mapping[str, Any],
    vocab_size: int,
    run_file: Mapping[str, Any],
    kind: Literal["import", "average"],
    sources: Mapping[str, Any],
    state: TrainState,
) -> None:
    """Write the folder, which must be new or empty. Raises UserError; nothing is left behind then.

    `weights` are without a tied output head; `model` is as in an identity, and `vocab_size` is padded;
    `sources` tells what the weights were made from.
    """
    identity = Identity(1, 0, "none", "fp32", dict(model), vocab_size, tokenizer.sha256, {}, "matrices")
    with new_folder(folder) as partial:
        module = {"lm_head.weight": weights["wte.weight"], **weights}
        write_state(partial / "mp_rank_00_model_states.pt", {"module": module})
        (partial / "run.json").write_text(json.dumps(run_file, indent=1))
        (partial / ORIGIN).write_text(json.dumps({"kind": kind, **sources}, indent=1))
        (partial / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        write_commit(partial, state, Mixture(0), identity, [write_rank_manifest(partial, 0)], finite=True)


def origin_of(step_dir: Path) -> str | None:
    """Return the kind of such a folder; None for a step that a run saved."""
    path = step_dir / ORIGIN
    return str(json.loads(path.read_bytes())["kind"]) if path.is_file() else None
