"""Whatever DeepSpeed raises after it has checked a run file is one message; errors not due to that file are no part."""

import errno
import json
import sys

import pytest
from support import DEBUG_RUN, debug_run, overrides

from megagpt.__main__ import main
from megagpt.cli.pretrain import pretrain
from megagpt.engine.compilation import _has_compiler
from megagpt.errors import OwnRankError, UserError
from megagpt.guards.deepspeed_errors import _is_from_outside, deepspeed_explained
from megagpt.train.trainer import train

SHORT = [
    "megagpt.schedule.max_steps=2",
    "megagpt.schedule.warmup_steps=0",
    "megagpt.every.sample=0",
    "megagpt.data.val_tokens=128",
]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def zero(**section):
    return f"zero_optimization={json.dumps(section)}"


def started(dataset, device, folder, *options):
    """As training does, but without lint, which knows these keys."""
    run = debug_run(dataset, folder, *SHORT, *options)
    with deepspeed_explained(run):
        train(run, device)


def test_an_error_in_the_first_step_names_the_keys_to_suspect(dataset, device, tmp_path):
    with pytest.raises(OwnRankError, match=r"failed with ZeroDivisionError: .*engine\.py.*cannot do: steps_per_print$"):
        started(dataset, device, tmp_path / "run", "steps_per_print=0")


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        (zero(stage=2, zenflow={"topk_ratio": 0.1}, **OFFLOAD), "cannot start with this run file: TypeError: "),
        (zero(stage=3, offload_param={"device": "nvme"}), '"nvme_path" in DeepSpeed Config cannot be None'),
    ],
)
def test_an_error_of_any_type_at_the_start_is_one_message_and_leaves_nothing(dataset, device, tmp_path, key, complaint):
    with pytest.raises(UserError, match=complaint):
        started(dataset, device, tmp_path / "run", key)
    assert not (tmp_path / "run").exists()


def test_a_monitor_whose_package_is_missing_is_one_message(dataset, tmp_path, monkeypatch, capsys):
    for section, package in (("wandb", "wandb"), ("comet", "comet_ml"), ("megagpt.mlflow", "mlflow")):
        monkeypatch.setitem(sys.modules, package, None)
        arguments = overrides(dataset, tmp_path / "run", *SHORT, f"{section}.enabled=true")
        assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *arguments]) == 2
        message = capsys.readouterr().err
        assert message == (
            f"error: {section}.enabled=true needs the package {package}, which is not installed here; pip install "
            f"{package}, or remove the section\n"
        )
        assert not (tmp_path / "run").exists()
        assert main(["lint", str(DEBUG_RUN), *arguments]) == 2
        assert f"pip install {package}" in capsys.readouterr().out


def test_what_one_host_alone_may_lack_is_told_by_the_rank_that_lacks_it(dataset, device, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(OwnRankError, match="cannot start with this run file: ModuleNotFoundError: "):
        started(dataset, device, tmp_path / "run", "comet.enabled=true")


def test_our_own_errors_under_deepspeeds_forward_keep_their_traceback(dataset, device, tmp_path, monkeypatch):
    """DeepSpeed stands above them on the stack, and is not at fault."""

    def mistaken(*_, **__):
        raise TypeError("our own")

    monkeypatch.setattr("megagpt.model.gpt.Block.forward", mistaken)
    with pytest.raises(TypeError, match="our own"):
        started(dataset, device, tmp_path / "run")


def test_a_full_disk_under_deepspeed_is_not_due_to_the_run_file(dataset, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    caller = {"__name__": "deepspeed.somewhere", "full": full}
    exec("def write(): full()", caller)
    with pytest.raises(OSError, match="No space left"), deepspeed_explained(debug_run(dataset, tmp_path / "run")):
        caller["write"]()


@pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler or no Python headers")
def test_a_refused_start_that_would_compile_leaves_nothing(dataset, device, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(UserError, match="ModuleNotFoundError"):
        started(dataset, device, tmp_path / "run", "comet.enabled=true", "megagpt.compile=true")
    assert not (tmp_path / "run").exists()


def test_training_refuses_what_lint_names(dataset, tmp_path, capsys):
    arguments = overrides(
        dataset, tmp_path / "run", *SHORT, "gradient_clipping=0", zero(stage=1, compute_grad_norm=False)
    )
    assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *arguments]) == 2
    assert "zero_optimization.compute_grad_norm=false leaves the gradient norm unknown" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_errors_that_are_not_due_to_the_run_file_pass_unchanged(dataset, tmp_path):
    run = debug_run(dataset, tmp_path)
    with pytest.raises(TypeError, match="our own"), deepspeed_explained(run):
        raise TypeError("our own")
    for lost in ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer", "NCCL error: ...", "CUDA error: ECC"):
        assert _is_from_outside(RuntimeError(lost))
    assert _is_from_outside(MemoryError())
    assert not _is_from_outside(RuntimeError("expected scalar type Half but found Float"))
    assert not _is_from_outside(Exception("Current loss scale already at minimum - cannot decrease scale anymore."))
