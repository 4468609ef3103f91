"""The model card of an export (README.md), with the run's curves as a picture."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megagpt.checkpoint.commit import Saved, read_commit, run_of
from megagpt.checkpoint.load import LoadedModel
from megagpt.checkpoint.weights_folder import origin_of
from megagpt.data.packing import PACKING
from megagpt.huggingface.weights import model_type
from megagpt.metrics.metrics_file import METRICS, read_rows

CURVES = "curves.png"
MASKED = (
    "In training, attention stayed within each document. `transformers` has no such mask, so give it one document at a "
    "time."
)

# As text, the name of that token would be read letter by letter.
EXAMPLE = """In training each document began with the token `bos_token_id`, which the tokenizer does not add by itself:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
ids = [model.config.bos_token_id, *tokenizer("The ", add_special_tokens=False)["input_ids"]]
print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=50)[0]))
```"""

ORIGINS = {  # of a folder of weights
    "import": "imported from a Hugging Face folder, and not trained since",
    "average": "whose weights are the average of several steps of a training by megagpt",
}


def model_card(loaded: LoadedModel, name: str, license_name: str | None, lines: int, ties: int, *, drawn: bool) -> str:
    """Return the card in Markdown, with the front matter that the Hub reads."""
    step_dir, given = loaded.step_dir, loaded.tokenizer.tokenizer_json is not None
    saved = read_commit(step_dir)
    section = json.loads((step_dir / "run.json").read_bytes())["megagpt"]
    cfg = loaded.model.cfg
    shape = {"gpt2": "GPT-2", "llama": "model with Llama's blocks", "qwen3": "model with Qwen3's blocks"}
    front = ["---", *([f"license: {license_name}"] if license_name else []), "library_name: transformers"]
    front += ["pipeline_tag: text-generation", "tags:", "- megagpt", f"- {model_type(cfg)}", "---"]
    text = [
        *front,
        f"# {name}",
        f"A {shape[model_type(cfg)]}, {cfg.n_layer} layers, {cfg.n_head} heads and a width of {cfg.n_embd}, "
        + _history(saved, from_others=section.get("init_from") is not None)
        + ".",
        *([MASKED] if PACKING[loaded.packing.kind].masked else []),
        "## Use",
        EXAMPLE.format(name=name),
        "## Evaluation",
        _evaluation(saved),
        *([f"![Training and validation loss]({CURVES})"] if drawn else []),
        "## Training",
        "`megagpt_run.json` holds all settings. "
        + (f"Fingerprint of the validation data: {_fingerprint(saved.identity.data)}; " if saved.identity.data else "")
        + f"SHA-256 of the tokenizer: `{saved.identity.tokenizer}`.",
        "## Tokenizer",
        ("The one that the data was built with," if given else "Converted from SentencePiece and")
        + f" compared on {lines:,} lines, odd ones among them: "
        + (f"{ties} differ, by ties between segmentations of equal probability." if ties else "all have equal ids."),
        *([] if license_name else ["## License", "Not stated."]),
    ]
    return "\n\n".join(["\n".join(text[: len(front)]), *text[len(front) :]]) + "\n"


def _history(saved: Saved, *, from_others: bool) -> str:
    if origin := origin_of(saved.step_dir):
        return ORIGINS[origin]
    begun = "the weights of another model" if from_others else "random weights"
    return (
        f"trained by megagpt for {saved.state.step:,} steps, which are {saved.state.tokens_seen:,} tokens, from {begun}"
    )


def _fingerprint(data: dict[str, Any]) -> str:
    """Return the fingerprint of the validation data, or of several sets each with its name."""
    val = data["val"]
    return ", ".join(f"{name} `{found}`" for name, found in val.items()) if isinstance(val, dict) else f"`{val}`"


def _evaluation(saved: Saved) -> str:
    values: dict[str, float | None] = {"val/loss": saved.state.val_loss} if saved.state.val_loss is not None else {}
    if origin_of(saved.step_dir) is None:
        rows = [row for row in read_rows(run_of(saved.step_dir) / METRICS) if row["step"] == saved.state.step]
        values = {name: value for row in rows for name, value in row.items() if name.startswith("val/")}
    if not values:
        return "It was not evaluated in training."
    table = [f"| {name.removeprefix('val/')} | {value:.4f} |" for name, value in values.items() if value is not None]
    return "On the validation data, at this step:\n\n| | |\n|---|---|\n" + "\n".join(table)


def write_curves(step_dir: Path, folder: Path) -> bool:
    """Draw the losses up to this step; returns whether there were any."""
    if origin_of(step_dir) is not None:
        return False
    last = read_commit(step_dir).state.step
    rows = [row for row in read_rows(run_of(step_dir) / METRICS) if row["step"] <= last]
    curves = {
        name: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        for name in ("train/loss", "val/loss")
    }
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    if not axes.has_data():
        return False
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    FigureCanvasAgg(figure).print_png(folder / CURVES)
    return True
