import pytest
import torch
from support import debug_run

from megagpt.engine.precision import multiplies_bf16, with_supported_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def bf16_run(dataset, tmp_path):
    return debug_run(dataset, tmp_path, "bf16.enabled=true", "bf16.immediate_grad_update=true")


def test_bf16_becomes_fp32_on_a_cpu_that_would_emulate_it(bf16_run, device, capsys):
    run = with_supported_dtype(bf16_run, CPU)
    native = multiplies_bf16()
    assert run.deepspeed.dtype == ("bf16" if native else "fp32")
    assert run.deepspeed_raw["bf16"] == {"enabled": native, "immediate_grad_update": True}
    assert ("training in fp32" in capsys.readouterr().out) == (not native)
    assert bf16_run.deepspeed_raw["bf16"]["enabled"] is True


def test_bf16_stays_where_the_processor_multiplies_it(bf16_run, device, monkeypatch, capsys):
    monkeypatch.setattr("megagpt.engine.precision.multiplies_bf16", lambda: True)
    assert with_supported_dtype(bf16_run, CPU) is bf16_run
    monkeypatch.setattr("megagpt.engine.precision.multiplies_bf16", lambda: False)
    assert with_supported_dtype(bf16_run, CUDA) is bf16_run
    assert capsys.readouterr().out == ""


def test_a_run_in_fp32_is_left_alone(dataset, tmp_path, device, capsys):
    run = debug_run(dataset, tmp_path)
    assert with_supported_dtype(run, CPU) is run
    assert capsys.readouterr().out == ""
