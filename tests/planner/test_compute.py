"""The time of a GPU's compute: by hand, and against runs that others published."""

from dataclasses import replace

import pytest
from published import comparisons, like_ours, near, published, run_file, verdicts
from support import ROOT

from megagpt.config.batch import batch_plan
from megagpt.config.model import ModelConfig
from megagpt.config.run_file import RunConfig, parse_run
from megagpt.model.flops import n_params
from megagpt.planner.compute import SMALLEST_COMPARED, UPDATE, compute_seconds, counted_flops, work
from megagpt.planner.estimate import machine, setting
from megagpt.planner.report import assumptions

GPT2_SMALL = next(row for row in published()["runs"] if row["source"] == "llm.c")


@pytest.fixture(scope="module")
def found():
    return comparisons()


@pytest.fixture(scope="module")
def own():
    return comparisons(replaces=False)


def test_nine_of_ten_published_runs_are_within_a_fifth(found):
    """Of 124 million to 70 billion parameters, and also of those that no constant was chosen by."""
    held_out = [c for c in found if not c.chosen_by]
    assert near(found) >= 0.9 * len(found)
    assert near(held_out) >= 0.9 * len(held_out)
    sizes = [parameters(name) for name in {c.run["model"] for c in found}]
    assert SMALLEST_COMPARED <= min(sizes) < 1.01 * SMALLEST_COMPARED
    assert 70e9 < max(sizes) < 71e9


def test_every_published_run_names_its_source_and_is_in_no_row_twice():
    data = published()
    rows = [(row["source"], row["model"], row["gpu"], row["ranks"], row["micro_batch"]) for row in data["runs"]]
    assert len(set(rows)) == len(rows)
    assert {row["source"] for row in data["runs"]} == set(data["sources"])
    assert all(source["url"].startswith("https://") for source in data["sources"].values())


def parameters(name: str) -> int:
    model = published()["models"][name]
    seq_len = next(row["seq_len"] for row in published()["runs"] if row["model"] == name)
    return n_params(ModelConfig(**{"seq_len": seq_len, **model["model"]}), model["vocab_size"])


def test_models_of_published_runs_have_the_parameters_that_their_sources_say():
    told = {name: model["parameters"] for name, model in published()["models"].items() if "parameters" in model}
    assert len(told) > 10
    assert {name: parameters(name) for name in told} == told


def test_documentation_and_plan_tell_how_near_the_plan_is(found, own):
    text = " ".join((ROOT / "docs" / "train.md").read_text("utf-8").split())
    assert all(f'"{line.rpartition(": ")[2]}"' in text for line in verdicts(found, own))
    alike = like_ours(own)
    assert {c.run["gpu"] for c in alike} == {"A100", "A100 40GB", "H100", "H200", "B200"}
    assumed = " ".join(assumptions(run_of(), machine("A100", 8, None)))
    assert f"{near(alike)} of {len(alike)} published runs with kernels like ours" in assumed


def run_of(**changes) -> RunConfig:
    return parse_run(run_file({**GPT2_SMALL, **changes}))


def test_work_of_a_step_by_hand():
    """For each of 65,536 tokens: 6 FLOPs of each parameter that is multiplied, and half of 14 L C T."""
    run, L, C, T = run_of(), 12, 768, 1024
    done = work(run, batch_plan(run.deepspeed, 8), 50304)
    multiplied = n_params(run.megagpt.model, 50304) - T * C
    assert done.products == 64 * T * 6 * multiplied
    assert done.attention == pytest.approx(64 * T * 7 * L * C * T)
    # 16 units three times in products, 53 for all else; logits in three products and eight bytes of the loss.
    of_tokens = 64 * T * (L * (3 * 16 + 53) * C * 2 + 3 * (50304 + C) * 2 + 50304 * 8)
    n = n_params(run.megagpt.model, 50304)
    assert done.moved == pytest.approx(of_tokens + 7 * 2 * n + UPDATE * n / 8)
    again = work(run_of(recompute="full"), batch_plan(run.deepspeed, 8), 50304)
    assert again.products - done.products == 64 * T * 2 * (multiplied - 50304 * C - L * 13 * C - 2 * C)
    assert again.attention - done.attention == pytest.approx(64 * T * 2 * L * C * T)


def test_a_measured_efficiency_wins():
    run = run_of()
    batch, gpu = batch_plan(run.deepspeed, 8), machine("A100", 1, None).gpu
    assert compute_seconds(run, batch, 50304, gpu, 0.5) == counted_flops(run, batch, 50304) / (8 * 312e12 * 0.5)
    slower = replace(machine("A100", 8, None), efficiency=0.25)
    assert setting(run, slower, 50304).time.compute == 2 * compute_seconds(run, batch, 50304, gpu, 0.5)


def test_narrow_models_and_fast_gpus_reach_less_of_the_peak():
    """The peak's FLOPs wait for more bytes: of narrow matrices, and where the memory is not as much faster."""

    def share(width: int, gpu: str) -> float:
        run = run_of().changed(f"megagpt.model.n_embd={width}")
        on = machine(gpu, 8, None)
        step = setting(run, on, 50304)
        return counted_flops(run, batch_plan(run.deepspeed, 8), 50304) / (8 * on.gpu.peak_flops * step.time.compute)

    for gpu in ("A100", "H100"):
        shares = [share(width, gpu) for width in (192, 384, 768, 1536, 3072)]
        assert shares == sorted(shares)
        assert shares[-1] < 0.8
    assert share(768, "H100") < share(768, "H200") < share(768, "A100")
