"""What throughput.py makes of its measurements: figures for a JSON file, and a table of them."""

import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from megagpt.config.model import ModelConfig
from megagpt.model.flops import causal_flops_per_token, flops_per_token
from megagpt.planner.gpu_specs import peak_flops
from megagpt.tokenizer.tokenizer import padded_vocab_size

HERE = Path(__file__).parent
SIZES = {  # n_layer, n_head, n_embd
    "tiny": (2, 2, 64),
    "10M": (6, 6, 384),
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
LOSS_TOLERANCE = 0.02  # nats per token, at the last step


def summary(setting: dict[str, Any], results: dict[str, list[dict[str, Any]] | str]) -> dict[str, Any]:
    """What the table shows, for each contestant."""
    n_layer, n_head, n_embd = SIZES[setting["model"]]
    cfg = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, seq_len=setting["seq"])
    vocab_size = padded_vocab_size(setting["vocab_size"])
    full, causal = flops_per_token(cfg, vocab_size), causal_flops_per_token(cfg, vocab_size)
    peak = peak_flops(torch.cuda.get_device_name()) if setting["device"] == "cuda" else None
    matmul = results["matmul"]
    rates = [max(turn["flops_per_sec"].values()) for turn in matmul] if isinstance(matmul, list) else []
    reference = setting["peers"][0]
    rows: dict[str, Any] = {}
    for name in setting["peers"]:
        turns = results[name]
        if isinstance(turns, str) or isinstance(results[reference], str):
            rows[name] = {"failed": turns if isinstance(turns, str) else f"{reference} failed"}
            continue
        speeds = [turn["steps"] * setting["tokens_per_step"] / turn["seconds"] for turn in turns]
        speed, own = statistics.median(speeds), [turn["seconds"] / turn["steps"] for turn in turns]
        first = [turn["seconds"] / turn["steps"] for turn in results[reference]]
        ratios = [theirs / ours for theirs, ours in zip(own, first, strict=False)]
        apart = turns[-1]["loss"] - results[reference][len(turns) - 1]["loss"]
        rows[name] = {
            "tokens_per_sec": speed,
            "tokens_per_sec_of_turns": speeds,
            "reference_over_this": statistics.median(ratios),
            "reference_over_this_of_turns": ratios,
            "mfu_full": peak and speed * full / (peak * setting["ranks"]),
            "mfu_causal": peak and speed * causal / (peak * setting["ranks"]),
            "of_matmul_rate": statistics.median(
                one * full / (rate * setting["ranks"]) for one, rate in zip(speeds, rates, strict=False)
            )
            if rates
            else None,
            "memory_gib": max(turn["memory_gib"] for turn in turns),
            "loss": turns[-1]["loss"],
            "loss_agrees": abs(apart) <= LOSS_TOLERANCE,
            "start_seconds": turns[0]["start_seconds"],
        }
    rate, clocks = (statistics.median(rates), matmul[-1]["clocks"]) if rates else (None, "")
    return {"matmul_flops_per_sec": rate, "clocks": clocks, "contestants": rows}


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    first = next(iter(report["contestants"]))
    head = ["contestant", "tokens/s: median (min to max)", f"{first} / this", "MFU full", "MFU causal"]
    lines = [[*head, "of the matmul rate", "peak GiB", "start to first step", "loss at the last step"]]
    for name, row in report["contestants"].items():
        if "failed" in row:
            lines.append([name, row["failed"][:120], *["-"] * 7])
            continue
        speeds, ratios = row["tokens_per_sec_of_turns"], row["reference_over_this_of_turns"]
        shares = [row[key] for key in ("mfu_full", "mfu_causal", "of_matmul_rate")]
        lines.append(
            [
                name,
                f"{row['tokens_per_sec']:,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
                f"{row['reference_over_this']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                *("-" if share is None else f"{share:.1%}" for share in shares),
                f"{row['memory_gib']:.2f}",
                f"{row['start_seconds']:.1f} s",
                f"{row['loss']:.4f}" + ("" if row["loss_agrees"] else f", MORE THAN {LOSS_TOLERANCE} APART"),
            ]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join([_caption(report), "", *("| " + " | ".join(line) + " |" for line in lines)])


def _caption(report: dict[str, Any]) -> str:
    setting, rate, hardware = report["setting"], report["matmul_flops_per_sec"], report["hardware"]
    cpu = f"{hardware['cores']} cores of {hardware['cpu']} ({(hardware['cpu_flags'] or ['?'])[-1]})"
    machine = report["clocks"] or f"{cpu}, {report['threads']} threads"
    return (
        f"{setting['model']}, {setting['seq']} tokens a sequence, micro-batch {setting['micro_batch']}, "
        f"{setting['tokens_per_step']:,} tokens a step, {setting['dtype']}, {setting['ranks']} ranks; "
        f"{setting['rounds']} rounds of {setting['steps']} steps; {report['date']}, commit {report['commit']}; "
        f"{machine}; matmul " + (f"{rate / 1e12:.3f} TFLOP/s" if rate else "not measured")
    )


def hardware(device: str) -> dict[str, Any]:
    """What it ran on."""
    facts: dict[str, Any] = {"host": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    facts |= {"cpu": platform.processor(), "cpu_flags": []}
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        facts |= {"cpu": fields.get("model name"), "cpu_mhz": fields.get("cpu MHz")}
        flags = fields.get("flags", "").split()
        facts["cpu_flags"] = sorted(flag for flag in flags if flag.startswith(("avx", "amx")))
    if device == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def commit() -> str:
    """The checkout's commit, with a + if files differ from it."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "")
