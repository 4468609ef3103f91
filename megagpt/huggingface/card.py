"""The model card of an export (README.md), with the run's curves as a picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megagpt.checkpoint.commit import Saved, read_commit, run_of
from megagpt.checkpoint.identity import OTHERS
from megagpt.checkpoint.load import LoadedModel
from megagpt.checkpoint.weights_folder import ORIGIN, origin_of
from megagpt.config.validation_sets import sets_of
from megagpt.data.packing import PACKING
from megagpt.huggingface.weights import model_type
from megagpt.metrics.metrics_file import METRICS, read_rows
from megagpt.terminal import counted

CURVES = "curves.png"
MASKED = (
    "In training, attention stayed within each document. `transformers` has no such mask, so give it one document at a "
    "time."
)
NOT_EVALUATED = "It was not evaluated in training."
TABLE = "| | |\n|---|---|\n"

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
        f"A {shape[model_type(cfg)]}, {counted(cfg.n_layer, 'layer')}, {counted(cfg.n_head, 'head')} and a width of "
        f"{cfg.n_embd}, " + _history(saved, from_others=section.get("init_from") is not None) + ".",
        *([MASKED] if PACKING[loaded.packing.kind].masked else []),
        "## Use",
        EXAMPLE.format(name=name),
        "## Evaluation",
        _evaluation(saved, section),
        *([f"![Training and validation loss]({CURVES})"] if drawn else []),
        "## Training",
        f"`megagpt_run.json` holds all settings. SHA-256 of the tokenizer: `{saved.identity.tokenizer}`.",
        *(_fingerprints(saved.identity.data, section) if saved.identity.data else ()),
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


def _fingerprints(data: Mapping[str, Any], section: Mapping[str, Any]) -> list[str]:
    """Return the fingerprint of the validation data, or a list of those of several sets."""
    val, others = data["val"], data.get(OTHERS, {})
    if isinstance(val, str) and not others:
        return [f"Fingerprint of the validation data: `{val}`."]
    deciding = val if isinstance(val, dict) else dict.fromkeys(sets_of(section, deciding=True), val)
    listed = "\n".join(f"- {name}: `{found}`" for name, found in (deciding | others).items())
    return ["Fingerprints of the validation data:", listed]


def _evaluation(saved: Saved, section: Mapping[str, Any]) -> str:
    """Return the table of results, and what they were measured on."""
    if origin := origin_of(saved.step_dir):
        return _evaluation_of_average(saved, section) if origin == "average" else NOT_EVALUATED
    rows = [row for row in read_rows(run_of(saved.step_dir) / METRICS) if row["step"] == saved.state.step]
    values = {name: value for row in rows for name, value in row.items() if name.startswith("val/")}
    if not values:
        return NOT_EVALUATED
    table = [f"| {name.removeprefix('val/')} | {value:.4f} |" for name, value in values.items() if value is not None]
    return f"On the validation data, at this step{_which(section)}:\n\n" + TABLE + "\n".join(table)


def _evaluation_of_average(saved: Saved, section: Mapping[str, Any]) -> str:
    found = json.loads((saved.step_dir / ORIGIN).read_bytes()).get("evaluation")
    if found is None:  # also where an older megagpt wrote a loss, but not what it is of
        return NOT_EVALUATED
    on = f"On {found['tokens']:,} tokens of the "
    if found["is_val_loss"]:
        on += f"validation data{_which(section)}"
    else:
        data = ", ".join(f"`{fingerprint}`" for fingerprint in found["data"].values())
        on += f"{found['split']} split of data with the fingerprint {data}"
    return f"{on}:\n\n{TABLE}| loss | {found['loss']:.4f} |"


def _which(section: Mapping[str, Any]) -> str:
    """Tell of several validation sets, which of them `loss` is of."""
    if not section.get("data") or len(sets_of(section)) == 1:
        return ""
    deciding = sets_of(section, deciding=True)
    if len(deciding) == 1:
        return f" ({next(iter(deciding))}, where no other set is named)"
    weights = [f"{name} {one['weight']:g}" for name, one in deciding.items() if one.get("weight") is not None]
    how = f"weighted: {', '.join(weights)}" if weights else "by their tokens"
    return f" (the mean of {', '.join(deciding)}, {how}, where no set is named)"


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
