import pytest
import torch
from support import debug_run

from megagpt.engine.precision import multiplies_bf16, with_supported_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def bf16_run(dataset, tmp_path):
    return debug_run(dataset, tmp_path, "bf16.enabled=true", "bf16.immediate_grad_update=true")


def test_bf16_becomes_fp32_on_a_cpu_that_would_emulate_it(bf16_run, device, monkeypatch, capsys):
    monkeypatch.setattr("megagpt.engine.precision.multiplies_bf16", lambda: False)
    run = with_supported_dtype(bf16_run, CPU)
    assert run.deepspeed.dtype == "fp32"
    assert run.deepspeed_raw["bf16"] == {"enabled": False, "immediate_grad_update": True}
    assert "training in fp32" in capsys.readouterr().out
    assert bf16_run.deepspeed_raw["bf16"]["enabled"] is True


def test_this_processor_is_asked(bf16_run, device):
    assert with_supported_dtype(bf16_run, CPU).deepspeed.dtype == ("bf16" if multiplies_bf16() else "fp32")


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_avx512_and_amx_each_multiply_bf16(monkeypatch, avx512, amx):
    """Whatever oneDNN says: on x86 it calls its emulation support too."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert multiplies_bf16() == (avx512 or amx)


@pytest.mark.parametrize("answer", [False, True])
def test_on_other_processors_onednn_is_asked(monkeypatch, answer):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: answer)
    assert multiplies_bf16() == answer


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
