"""Compiled blocks and loss against the same in eager mode. In fp32, so that only the order of additions may differ."""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from support import debug_run, metric

from megagpt.config.batch import batch_plan
from megagpt.config.model import ModelConfig
from megagpt.engine.build import build_engine
from megagpt.engine.compilation import compile_blocks, compiles, why_no_kernels
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_score
from megagpt.train.trainer import train

VOCAB = 384
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
COMPILED = "megagpt.compile=true"


@pytest.fixture(scope="module")
@processes.start_here
def cache(tmp_path_factory):
    """One for all tests here: most of their time is the C++ compiler's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def losses_and_names(dataset, device, out_dir, *overrides):
    run = debug_run(dataset, out_dir, *overrides)
    engine = build_engine(run, batch_plan(run.deepspeed, 1), VOCAB, device, compiled=bool(run.megagpt.compile))
    tokens = torch.randint(0, VOCAB, (4, 65), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)  # of dropout
    losses = []
    for _ in range(6):
        score = next_token_score(tokens[:, 1:], compiled=bool(run.megagpt.compile))
        engine.backward(loss := engine(tokens[:, :-1], score=score))
        engine.step()
        losses.append(loss.item())
    return losses, list(engine.module.state_dict())


SHORTCUTS = ["megagpt.model.value_residual=true", "megagpt.model.embedding_shortcut=true"]
FULL, WITH_DEEPSPEED = '{"policy": "full"}', '{"policy": "full", "kind": "deepspeed"}'
SELECTIVE, BUDGET = '{"policy": "selective"}', '{"policy": "budget", "budget": 0.3}'


@pytest.mark.parametrize(("stage", "recompute"), [(0, FULL), (1, "{}"), (2, WITH_DEEPSPEED), (3, "{}"), (3, FULL)])
def test_compiled_training_is_eager_training(cache, dataset, device, tmp_path, stage, recompute):
    """At stage 3 with nothing left whole between uses, so that weights are gathered around compiled blocks."""
    common = [f"zero_optimization.stage={stage}", f"megagpt.recompute={recompute}"]
    common += ["zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []
    common += SHORTCUTS if recompute == FULL else []
    eager, names = losses_and_names(dataset, device, tmp_path / "eager", *common)
    compiled, same = losses_and_names(dataset, device, tmp_path / "compiled", *common, COMPILED)
    assert compiled == pytest.approx(eager, rel=1e-6)
    assert compiled[-1] < compiled[0] - 0.1
    assert same == names


@pytest.mark.parametrize(("stage", "dropout", "recompute"), [(1, 0.2, FULL), (3, 0.2, SELECTIVE), (1, 0.0, BUDGET)])
def test_what_compiled_blocks_compute_again_changes_nothing(
    cache, dataset, device, tmp_path, stage, dropout, recompute
):
    """Dropout has the same masks again. (Under a budget it would not: it is refused.)"""
    common = [f"megagpt.regularization.dropout={dropout}", f"zero_optimization.stage={stage}", COMPILED]
    kept, _ = losses_and_names(dataset, device, tmp_path / "kept", *common)
    again, _ = losses_and_names(dataset, device, tmp_path / "again", *common, f"megagpt.recompute={recompute}")
    assert again == pytest.approx(kept, rel=1e-6)


def test_one_compilation_serves_all_blocks(cache, dataset, device, tmp_path):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    losses_and_names(dataset, device, tmp_path, "megagpt.model.n_layer=4", COMPILED)
    assert counters["stats"]["unique_graphs"] == 2  # a block's, and the loss's


def test_compiled_blocks_keep_less_in_the_ladders_order(cache, dataset, device, tmp_path):
    """C = 64 numbers a token: kept whole a block has 15 C of its own and its input; selective 8 C and its input."""
    kept = {}
    for recompute in ("{}", BUDGET, SELECTIVE, FULL):
        run = debug_run(dataset, tmp_path / "run", f"megagpt.recompute={recompute}", COMPILED)
        module = build_engine(
            run, batch_plan(run.deepspeed, 1), VOCAB, device, compiled=bool(run.megagpt.compile)
        ).module
        x, block, held = torch.randn(4, 64, 64, requires_grad=True), next(module.blocks()), {}
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.data_ptr(), t), lambda t: t):  # noqa: B023
            module.recompute(0, block, x).sum()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held.values()}
        kept[recompute] = sum(size for at, size in storages.items() if at not in weights) / x.untyped_storage().nbytes()
    statistics = 6 / 64  # of LayerNorms and attention, as in test_build.py
    assert kept["{}"] == pytest.approx(16, abs=statistics)
    assert kept[SELECTIVE] == pytest.approx(9, abs=statistics)
    assert kept[FULL] == 1.0
    assert kept[BUDGET] < 0.6 * kept["{}"]


def test_a_run_goes_on_compiled_and_again_without(cache, dataset, device, tmp_path):
    """Through trainer.train, with evaluation and samples: checkpoints are the same thing."""

    def go_on(out_dir, max_steps, *overrides):
        schedule = f'megagpt.schedule={{"max_steps": {max_steps}, "warmup_steps": 2, "shape": "constant"}}'
        train(debug_run(dataset, tmp_path / out_dir, schedule, *overrides), device)
        return metric(tmp_path / out_dir, "train/loss")

    go_on("mixed", 4, COMPILED)
    go_on("mixed", 8)
    mixed = go_on("mixed", 12, COMPILED)
    assert mixed == pytest.approx(go_on("eager", 12), rel=1e-5)


def test_by_default_only_cuda_is_compiled_for():
    assert compiles(None, CUDA)
    assert not compiles(None, CPU)
    assert compiles(True, CPU)
    assert not compiles(False, CUDA)


def test_without_a_compiler_it_is_refused_if_asked_for_and_left_out_otherwise(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert shutil.which("g++") is None
    assert not compiles(None, CUDA)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        compiles(True, CPU)


def test_a_compiler_that_torch_does_not_call_is_none(monkeypatch, tmp_path):
    """It calls g++ alone, or what CXX names."""
    for name in ("clang++", "c++"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not compiles(None, CUDA)
    monkeypatch.setenv("CXX", "missing")
    assert not compiles(None, CUDA)
    monkeypatch.setenv("CXX", "clang++")
    assert compiles(None, CUDA)


def test_without_pythons_headers_it_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    assert not compiles(None, CUDA)
    (tmp_path / "Python.h").touch()
    assert compiles(None, CUDA)


def kernel_folders(monkeypatch, tmp_path) -> dict[str, Path]:
    """A cache folder of the user and a TMPDIR of this test; nothing has chosen a folder for kernels yet."""
    places = {"XDG_CACHE_HOME": tmp_path / "cache", "TMPDIR": tmp_path / "tmp"}
    for name, place in places.items():
        place.mkdir()
        monkeypatch.setenv(name, str(place))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is restored
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    return places


@pytest.mark.long
def test_every_length_of_a_warm_up_is_compiled(tmp_path, monkeypatch):
    """Blocks of two kinds in 17 lengths are 34 compilations of one code object; without kernels, to be quick."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = GPT(ModelConfig(n_layer=2, n_head=1, n_embd=8, value_residual=True), 128).eval()
    tokens = torch.arange(17)[None]
    eager = [model(tokens[:, :n]) for n in range(1, 18)]
    torch._dynamo.reset()
    compile_blocks(model, tmp_path)
    for n, expected in enumerate(eager, start=1):
        torch.testing.assert_close(model(tokens[:, :n]), expected)


def test_a_blank_in_out_dir_does_not_reach_the_compiler(tmp_path, monkeypatch, capsys):
    places, model = kernel_folders(monkeypatch, tmp_path), GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8), 128)
    for name, below in {"XDG_CACHE_HOME": "megagpt/kernels", "TMPDIR": f"megagpt_kernels_{os.getuid()}"}.items():
        compile_blocks(model, tmp_path / "a b's" / "compiled")
        kernels = places[name] / below
        assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(kernels)
        assert kernels.is_dir()
        assert f"compiled kernels are kept in {kernels}, not in " in capsys.readouterr().out
        monkeypatch.setenv(name, str(tmp_path / "another blank"))
        monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "another blank"))
    with pytest.raises(
        UserError, match=r"no folder for compiled kernels: .* has a blank .* set TORCHINDUCTOR_CACHE_DIR"
    ):
        compile_blocks(model, tmp_path / "a b's" / "compiled")
    compile_blocks(model, tmp_path / "runs" / "compiled")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "runs" / "compiled")


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_folder_mounted_noexec_keeps_no_kernels(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "noexec,size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        assert why_no_kernels(tmp_path / "kernels") == "is mounted noexec"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_keep_kernels_says_why(tmp_path):
    assert why_no_kernels(tmp_path / "new" / "kernels") == ""
    assert "has a blank" in why_no_kernels(tmp_path / "a b")
    assert "cannot be written" in why_no_kernels(Path("/proc/kernels"))
    (tmp_path / "file").touch()
    assert "cannot be written" in why_no_kernels(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_that_others_may_write_to_keeps_no_kernels(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    theirs.chmod(0o777)
    assert why_no_kernels(theirs) == "belongs to another user"
