"""Load an exported folder with transformers alone, in a process of its own, and compare it with what was exported.

    python -m megagpt.huggingface.check FOLDER EXPECTED

EXPECTED is a folder with `logits.safetensors` (windows (N, T) and logits (N, T, V) in fp32) and `lines.json`, a list
of [text, ids]. Prints one JSON object.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def compare(folder: Path, expected: Path) -> dict[str, object]:
    """Return the largest difference of a logit, tensors missing or left over, and each line whose ids differ."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    tensors = load_file(expected / "logits.safetensors")
    largest = 0.0
    with torch.no_grad():
        for window, logits in zip(tensors["windows"], tensors["logits"], strict=True):
            found = model.eval()(input_ids=window.unsqueeze(0)).logits[0]
            largest = max(largest, (found - logits).abs().max().item()) if found.shape == logits.shape else float("inf")
    lines = json.loads((expected / "lines.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found_ids = tokenizer([text for text, _ in lines], add_special_tokens=False)["input_ids"]
    differing = [[i, ids] for i, (ids, (_, wanted)) in enumerate(zip(found_ids, lines, strict=True)) if ids != wanted]
    return {
        "largest": largest,
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "not_as_written": sorted(map(str, (*loading["missing_keys"], *loading["unexpected_keys"]))),
        "differing": differing,
    }


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
