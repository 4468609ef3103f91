"""Runs of two gloo ranks that compute half of each sample's positions each, for test_sequence_parallel.py."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support import SHARING, debug_run, run_scenarios
from two_ranks import DEVICE, digest, keeping_the_engine, newest_weights, stopped_after, train

from megagpt.checkpoint.load import load_model
from megagpt.engine.build import Engine
from megagpt.model.generate import complete


def sharing_positions(dataset: Path, folder: Path) -> dict[str, Any]:
    """Both ranks on each sample, half of its positions each. The runs are left for the test to compare."""
    for name, options in SHARING.items():
        compiled = f"megagpt.compile={json.dumps(name == 'stage2')}"  # which is to change nothing
        train(dataset, folder / name, "sequence_parallel_size=2", compiled, *options)
    bf16 = ["bf16.enabled=true", "megagpt.schedule.max_steps=8"]
    for size in (1, 2):
        train(dataset, folder / f"bf16 by {size}", f"sequence_parallel_size={size}", *bf16)

    engines: list[Engine] = []
    options = ["sequence_parallel_size=2", "megagpt.regularization.dropout=0.1", *SHARING["stage3"]]
    with keeping_the_engine(engines):
        straight = train(dataset, folder / "straight", *options)
    with stopped_after(4):
        cut = train(dataset, folder / "cut", *options)
    resumed = train(dataset, folder / "cut", *options)
    with stopped_after(4):
        train(dataset, folder / "changed", "sequence_parallel_size=2", *SHARING["stage1"])
    train(dataset, folder / "changed", *SHARING["stage1"])

    alone, tokenizer, *_ = load_model(folder / "straight", DEVICE)
    sample = debug_run(dataset, folder).megagpt.sample
    return {
        "folder": str(folder),
        "cut_at": cut.step,
        "states": [asdict(straight), asdict(resumed)],
        "weights": [digest(newest_weights(folder / run)) for run in ("straight", "cut")],
        "texts": [complete(model, tokenizer, ["the "], sample)[0].whole for model in (engines[0].module, alone)],
    }


if __name__ == "__main__":
    run_scenarios([sharing_positions])
