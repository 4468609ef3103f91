import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from support import debug_run, metric, write_corpus

from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.__main__ import main
from megagpt.checkpoint import load, rotation, save
from megagpt.checkpoint.commit import COMMIT, best, committed, read_commit, write_rank_manifest
from megagpt.checkpoint.load import load_model
from megagpt.checkpoint.run_samples import open_run
from megagpt.data.training_set import TrainingSet
from megagpt.engine.safe_pickle import load_checked
from megagpt.engine.state_files import consolidated_weights
from megagpt.errors import UserError
from megagpt.train.trainer import train

CPU = torch.device("cpu")
DROPOUT = "megagpt.regularization.dropout=0.1"
CONSTANT = ["megagpt.schedule.shape=constant", "megagpt.schedule.warmup_steps=0"]  # a shorter run has the same rates
SAVE_OFTEN = 'megagpt.every={"log": 1, "eval": 4, "save": 2}'
FIRST_IS_BEST = "megagpt.early_stopping.min_delta=100"  # nats: no later evaluation is that much better
SCHEDULE = [*CONSTANT, SAVE_OFTEN, "megagpt.data.val_tokens=256"]


@pytest.fixture
def run_to(dataset, device, tmp_path):
    def run(name: str, max_steps: int, *overrides: str, fresh: bool = False):
        options = [*SCHEDULE, f"megagpt.schedule.max_steps={max_steps}", *overrides]
        return train(debug_run(dataset, tmp_path / name, *options), device, fresh=fresh)

    return run


@pytest.mark.parametrize(
    ("stage", "dtype", "offload"),
    [
        (0, "fp32", "none"),
        (0, "bf16", "none"),
        (1, "bf16", "none"),
        (2, "fp32", "none"),
        (2, "fp32", "cpu"),
        (3, "fp32", "none"),
        (3, "bf16", "none"),
    ],
)
def test_stopping_twice_and_going_on_equals_a_straight_run_to_the_last_bit(run_to, tmp_path, stage, dtype, offload):
    options = [
        DROPOUT,
        f"zero_optimization.stage={stage}",
        f"zero_optimization.offload_optimizer.device={offload}",
        f"bf16.enabled={json.dumps(dtype == 'bf16')}",
    ]
    run_to("straight", 8, *options)
    for max_steps in (3, 5, 8):
        run_to("cut", max_steps, *options)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert metric(cut, "train/loss") == metric(straight, "train/loss")
    weights, again = (consolidated_weights(committed(run)[-1]) for run in (straight, cut))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_without_the_random_generators_a_resume_with_dropout_differs(run_to, tmp_path, monkeypatch):
    """The control: the test above could not pass by chance."""
    run_to("straight", 6, DROPOUT)
    monkeypatch.setattr(load, "set_rng_state", lambda saved: None)
    for max_steps in (3, 6):
        run_to("cut", max_steps, DROPOUT)
    assert metric(tmp_path / "cut", "train/loss")[6] != metric(tmp_path / "straight", "train/loss")[6]


@pytest.fixture
def saved(run_to, tmp_path):
    run_to("run", 6)
    return tmp_path / "run"


def test_the_two_newest_steps_and_the_best_stay(run_to, tmp_path):
    run_to("run", 10, FIRST_IS_BEST, "megagpt.early_stopping.restore_best=false")
    steps = [path.name for path in committed(tmp_path / "run")]
    assert steps == ["step_00000004", "step_00000008", "step_00000010"]
    hints = {name: (tmp_path / "run/checkpoints" / name).read_text().strip() for name in ("latest", "best")}
    assert hints == {"latest": "step_00000010", "best": "step_00000004"}


def test_the_run_file_says_which_steps_stay(run_to, tmp_path):
    """Saved every 2 steps: of 2, 4, ... 14 the three newest, the multiples of 4, and the best of early stopping."""
    run_to(
        "run",
        14,
        'megagpt.every={"log": 4, "eval": 6, "save": 2}',
        FIRST_IS_BEST,
        'megagpt.keep={"last": 3, "every": 4}',
    )
    assert [int(path.name[5:]) for path in committed(tmp_path / "run")] == [4, 6, 8, 10, 12, 14]


def test_a_step_that_rotted_does_not_count_among_the_two_that_stay(run_to, tmp_path, capsys):
    """Steps 2, 4 and 6 are there and 4 rots before 8 comes, whose two are 6 and 8; then 8 rots before 10 comes."""
    run_to("run", 6, "megagpt.keep.last=3")
    step_2, step_4, step_6 = committed(tmp_path / "run")
    only_last = ["megagpt.every.save=0", "megagpt.every.eval=0", "megagpt.early_stopping.restore_best=false"]
    original = rotation.damaged_of_newest

    def rot(step_dir):
        """After the resume has verified it, before the next rotation."""
        (step_dir / "rng.0.json").write_text("{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "damaged_of_newest", lambda *args: rot(step_6) or original(*args))
        run_to("run", 8, *only_last)
    assert f"checkpoint quarantined: {step_6 / 'rng.0.json'} is damaged" in capsys.readouterr().out
    assert committed(tmp_path / "run")[-2] == step_4
    assert (step_6.with_name("damaged1_step_00000006")).is_dir()
    assert not step_2.exists() or best(tmp_path / "run") == step_2


def test_without_restore_best_the_best_is_the_lowest_loss_that_was_saved(run_to, tmp_path):
    """Evaluated every 2 steps, saved every 4: the lowest loss of all may lie between two saves."""
    cadence = 'megagpt.every={"log": 1, "eval": 2, "save": 4}'
    run_to("run", 12, cadence, "megagpt.early_stopping.restore_best=false")
    losses = {
        path: json.loads((path / COMMIT).read_text())["state"]["val_loss"] for path in committed(tmp_path / "run")
    }
    assert len(losses) >= 2
    assert best(tmp_path / "run") == min(losses, key=losses.get)


def test_an_edited_commit_record_is_noticed(saved, run_to, capsys):
    """Eight samples more would silently change which data comes next."""
    commit = committed(saved)[-1] / COMMIT
    commit.write_text(commit.read_text().replace('"samples_seen": 48', '"samples_seen": 56'))
    run_to("run", 7)
    assert f"checkpoint skipped: {commit} was changed" in capsys.readouterr().out


def test_a_file_that_another_rank_is_writing_gets_into_no_manifest(tmp_path):
    (tmp_path / "rng.0.json").write_text("{}")
    (tmp_path / "manifest.1.json.tmp").write_text("{")
    write_rank_manifest(tmp_path, 0)
    assert list(json.loads((tmp_path / "manifest.0.json").read_text())) == ["rng.0.json"]


def test_a_full_disk_ends_in_one_message_and_the_step_before_stands(saved, run_to, monkeypatch):
    def full(path, data):
        if path.name == "rng.0.json":
            raise OSError(28, "No space left on device", str(path))

    before = committed(saved)
    monkeypatch.setattr(save, "write_atomically", full)
    with pytest.raises(UserError, match=r"could not be saved: .*No space left on device.*the one before it is intact"):
        run_to("run", 8)
    assert committed(saved) == before


def test_a_step_whose_hint_cannot_be_written_is_said_to_be_saved_and_is_gone_on_from(saved, run_to, capsys):
    hint = saved / "checkpoints" / "latest"
    hint.unlink()
    hint.mkdir()
    with pytest.raises(
        UserError, match=r"step_00000008 was saved, but the `latest` pointer could not be updated .*Is a directory"
    ):
        run_to("run", 8)
    hint.rmdir()
    capsys.readouterr()
    assert run_to("run", 9).step == 9
    assert "resuming from" in (said := capsys.readouterr().out)
    assert "step_00000008" in said


def test_fresh_leaves_a_folder_that_is_no_run_alone(dataset, device, tmp_path):
    (tmp_path / "precious").touch()
    run = debug_run(dataset, tmp_path, *SCHEDULE, "megagpt.schedule.max_steps=1")
    train(run, device, fresh=True)
    assert (tmp_path / "precious").exists()


def test_a_step_without_commit_is_no_checkpoint(saved, run_to):
    (committed(saved)[-1] / COMMIT).unlink()
    assert run_to("run", 7).step == 7
    assert metric(saved, "train/loss").keys() == set(range(1, 8))


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng.0.json", "tokenizer.model"])
def test_one_flipped_bit_sends_the_run_to_the_step_before(saved, run_to, capsys, name):
    expected = metric(saved, "train/loss")
    damaged = committed(saved)[-1] / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    run_to("run", 6)
    assert f"checkpoint skipped: {damaged} is damaged" in capsys.readouterr().out
    assert metric(saved, "train/loss") == expected
    assert (saved / "checkpoints" / "damaged1_step_00000006" / name).read_bytes() == bytes(content)
    assert [path.name for path in committed(saved)][-2:] == ["step_00000004", "step_00000006"]


def test_a_file_that_is_gone_sends_the_run_to_the_step_before(saved, run_to, capsys):
    (committed(saved)[-1] / "mp_rank_00_model_states.pt").unlink()
    assert run_to("run", 6).step == 6
    assert "mp_rank_00_model_states.pt is missing" in capsys.readouterr().out


def test_when_no_committed_step_is_whole_nothing_starts_silently_from_zero(saved, run_to):
    for step_dir in committed(saved):
        (step_dir / "rng.0.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint in .* is undamaged .*rng\.0\.json.*--fresh"):
        run_to("run", 8)


def test_checkpoints_that_are_gone_do_not_look_like_a_new_run(saved, run_to):
    shutil.rmtree(saved / "checkpoints")
    with pytest.raises(UserError, match=r"step_00000006 was committed and is missing.*--fresh"):
        run_to("run", 8)
    run_to("run", 2, fresh=True)
    assert metric(saved, "train/loss").keys() == {1, 2}


def test_a_run_stopped_before_its_first_commit_starts_again_and_says_so(run_to, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save, "write_commit", lambda *args, **kw: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(UserError, match="could not be saved"):
        run_to("run", 2)
    monkeypatch.undo()
    capsys.readouterr()
    assert run_to("run", 2).step == 2
    assert ": starting at step 0" in capsys.readouterr().out


def test_fresh_keeps_the_old_run_beside_the_new_one(saved, run_to):
    before = metric(saved, "train/loss")
    run_to("run", 2, fresh=True)
    assert metric(saved, "train/loss").keys() == {1, 2}
    assert metric(saved.with_name("run.old1"), "train/loss") == before
    run_to("run", 2, fresh=True)
    assert committed(saved.with_name("run.old2"))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("megagpt.model.n_layer=3", r"model {'n_layer': 2}, and this run has {'n_layer': 3}"),
        ("megagpt.regularization.weight_decay_on=all", "weight_decay_on matrices, and this run has all"),
        ("optimizer.type=Muon", "optimizer Adam, and this run has Muon"),
        ("megagpt.data.seed=5", r"data {'seed': 1234}, and this run has {'seed': 5}"),
    ],
)
def test_a_run_that_is_another_run_is_refused_with_both_values(saved, run_to, override, complaint):
    with pytest.raises(UserError, match=complaint):
        run_to("run", 8, override)


def test_other_validation_data_is_refused_even_with_the_same_tokenizer(saved, device, dataset, tmp_path):
    corpus = write_corpus(tmp_path / "other.jsonl", 400)
    other = BuildConfig(tokenizer=dataset / "tokenizer.model", val_fraction=0.2, workers=1, seed=5)
    build([corpus], tmp_path / "other", other)
    options = [*SCHEDULE, "megagpt.schedule.max_steps=8"]
    with pytest.raises(UserError, match=r"val/loss was measured on the data \w{12}, and now"):
        train(debug_run(tmp_path / "other", saved, *options), device)


@pytest.fixture
def other(dataset, tmp_path):
    """Another corpus with the tokenizer of the first."""
    corpus = write_corpus(tmp_path / "other.jsonl", 400, seed=9)
    build([corpus], tmp_path / "other", BuildConfig(tokenizer=dataset / "tokenizer.model", workers=1))
    return tmp_path / "other"


@pytest.fixture
def rows_seen(monkeypatch):
    """Sample -> its row, as training last read it."""
    rows = {}
    fill = TrainingSet.fill

    def noting(self, first, into):
        fill(self, first, into)
        rows.update({first + i: row.tolist() for i, row in enumerate(into)})

    monkeypatch.setattr(TrainingSet, "fill", noting)
    return rows


def test_weights_length_and_global_batch_change_between_resumes_and_no_token_is_lost(
    run_to, dataset, other, tmp_path, rows_seen, capsys
):
    """The mixture's own test says that such a history reads each token once; this one, that training follows it."""
    both = f'megagpt.data.train=[{{"path": "{other}", "weight": 3}}, {{"path": "{dataset}"}}]'
    run_to("run", 3)
    run_to("run", 5, both)
    run_to("run", 7, both, "train_batch_size=4")
    capsys.readouterr()
    state = run_to("run", 9, both, "train_batch_size=4", "megagpt.data.seq_len=24")
    assert "samples from now on: 24 tokens, 75.00% from" in capsys.readouterr().out
    assert (state.step, state.samples_seen, state.tokens_seen) == (9, 56, 48 * 64 + 8 * 24)
    data = open_run(tmp_path / "run")
    assert [(s.first_sample, s.seq_len) for s in data.mixture.segments] == [(0, 64), (24, 64), (48, 24)]
    assert [len(data.mixture.samples_of(step)) for step in range(1, 10)] == [8] * 5 + [4] * 4
    inputs = set()
    for sample in range(56):
        spans = data.spans(sample)
        assert [t for span in spans for t in span.tokens.tolist()] == rows_seen[sample][:-1]
        for span in spans:
            tokens = {(span.dataset.path, span.start + i) for i in range(len(span.tokens))}
            assert not inputs & tokens
            inputs |= tokens
    assert len(inputs) == state.tokens_seen
    assert {path for path, _ in inputs} == {dataset, other}


def test_a_dataset_that_a_run_has_left_is_needed_only_to_see_its_samples(run_to, dataset, other, tmp_path):
    run_to("run", 2, f"megagpt.data.train.0.path={other}")
    shutil.move(other, tmp_path / "away")
    run_to("run", 4)
    data = open_run(tmp_path / "run")
    assert data.spans(16)[0].dataset.path == dataset
    with pytest.raises(UserError, match=r"other .*of these samples is no longer there"):
        data.spans(0)


def test_a_training_dataset_built_anew_in_its_place_is_refused(run_to, dataset, other, tmp_path):
    run_to("run", 2, f"megagpt.data.train.0.path={other}")
    shutil.rmtree(other)
    corpus = write_corpus(tmp_path / "newer.jsonl", 300, seed=10)
    build([corpus], other, BuildConfig(tokenizer=dataset / "tokenizer.model", workers=1))
    with pytest.raises(UserError, match=r"other was rebuilt since this run last read it"):
        run_to("run", 4, f"megagpt.data.train.0.path={other}")


def test_a_checkpoint_of_another_format_is_refused_by_number(saved, run_to):
    commit = committed(saved)[-1] / COMMIT
    record = json.loads(commit.read_text()) | {"version": 1}
    del record["sha256"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    commit.write_text(json.dumps(record | {"sha256": digest}))
    with pytest.raises(UserError, match=r"has format 1, and this megagpt reads format 2"):
        run_to("run", 8)


def test_what_changed_in_the_run_file_is_said_and_acts(saved, run_to, capsys):
    run_to("run", 8, "optimizer.params.lr=0.001", "optimizer.params.weight_decay=0.0", "megagpt.time_limit_minutes=60")
    out = capsys.readouterr().out
    assert "changed: optimizer.params.lr: 0.003 -> 0.001" in out
    assert "changed: megagpt.schedule.max_steps: 6 -> 8" in out
    assert "changed: megagpt.time_limit_minutes: null -> 60" in out  # as a run file has it
    assert metric(saved, "optim/lr")[8] == 0.001


def test_loaded_weight_decay_is_the_run_files(saved, dataset, device, run_to, monkeypatch):
    """Loading Adam's state brings back the saved settings of its groups: the run file must win."""
    from megagpt.train import session

    engines = []
    build = session.build_engine
    monkeypatch.setattr(session, "build_engine", lambda *args, **kw: engines.append(build(*args, **kw)) or engines[-1])
    run_to("run", 8, "optimizer.params.weight_decay=0.03", "optimizer.params.betas=[0.8, 0.9]")
    groups = engines[0].optimizer.param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.03]
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_models_weights_are_the_engines(run_to, tmp_path, monkeypatch, stage):
    import deepspeed

    from megagpt.train import session

    engines = []
    build = session.build_engine
    monkeypatch.setattr(session, "build_engine", lambda *args, **kw: engines.append(build(*args, **kw)) or engines[-1])
    run_to("run", 3, f"zero_optimization.stage={stage}", "megagpt.early_stopping.restore_best=false")
    model, tokenizer, step_dir, _ = load_model(tmp_path / "run", CPU)
    assert step_dir.name == "step_00000003"
    assert not model.training
    assert tokenizer.vocab_size <= model.wte.num_embeddings
    for name, p in engines[0].module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            assert torch.equal(p, model.get_parameter(name)), name
    assert model.lm_head.weight is model.wte.weight


def test_a_run_folder_stands_for_its_best_step(run_to, tmp_path):
    run_to("run", 8, FIRST_IS_BEST)
    best_dir = best(tmp_path / "run")
    assert load_model(tmp_path / "run", CPU).step_dir == best_dir
    latest = committed(tmp_path / "run")[-1]
    assert latest != best_dir
    assert load_model(latest, CPU).step_dir == latest


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no committed checkpoint"):
        load_model(tmp_path, CPU)


def test_damaged_weights_are_not_loaded(saved):
    step_dir = best(saved)
    victim = next(step_dir.glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{victim.name} is damaged"):
        load_model(saved, CPU)


def test_the_list_of_checkpoints_names_what_is_wrong_and_counts_only_whole_steps(saved, capsys):
    """Sizes alone do not show a flipped bit; hashes do; a step without COMMIT and a damaged record are said too."""
    assert main(["checkpoints", str(saved), "--verify"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:-2]] == ["4", "6"]
    assert all(line.split()[5:8] == ["1", "fp32", "1"] for line in out[1:-2])
    assert out[-2:] == ["best: the lowest val/loss of these steps", "2 committed steps, 2 verified"]

    older, newer = committed(saved)
    victim = newer / "rng.0.json"
    victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    assert main(["checkpoints", str(saved)]) == 0
    assert "2 committed steps, 2 with all files" in capsys.readouterr().out
    assert main(["checkpoints", str(saved), "--verify"]) == 0
    out = capsys.readouterr().out
    assert f"{victim} is damaged" in out
    assert "2 committed steps, 1 verified" in out

    (older / COMMIT).write_text("{}")
    (saved / "checkpoints" / "step_00000099").mkdir()
    assert main(["checkpoints", str(saved), "--verify"]) == 2
    out = capsys.readouterr().out
    assert f"{older / COMMIT} was changed" in out
    assert "step_00000099: not committed" in out
    assert "0 verified" in out
    assert main(["checkpoints", str(saved.parent)]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err


def test_a_damaged_step_that_cannot_be_renamed_is_one_message(saved, run_to, monkeypatch):
    def rename(path, target):
        if target.name.startswith("damaged"):
            raise OSError(30, "Read-only file system", str(path))
        return original(path, target)

    newest = committed(saved)[-1]
    (newest / "rng.0.json").write_text("{}")
    original = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    message = rf"megagpt.out_dir={saved} cannot be written: .*Read-only file system"
    with pytest.raises(UserError, match=message):
        run_to("run", 8)
    with pytest.raises(UserError, match=message):
        rotation.retract(saved, 6, read_commit(newest).state)


@pytest.mark.parametrize("decay_on", ["matrices", "all"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_the_weights_of_a_step_at_stage_0_in_bf16_are_those_that_are_updated(
    dataset, device, tmp_path, optimizer, decay_on
):
    """Rounded, each is the weight that the model computed with, to the last bit; few of them are so before."""
    few = ["megagpt.schedule.max_steps=2", "megagpt.schedule.warmup_steps=0", "optimizer.params.lr=0.01"]
    more = ["zero_optimization.stage=0", "bf16.enabled=true", f"megagpt.regularization.weight_decay_on={decay_on}"]
    train(debug_run(dataset, tmp_path / "run", f"optimizer.type={optimizer}", *few, *more), device)
    [step_dir] = committed(tmp_path / "run")
    computed_with = load_checked(step_dir / "mp_rank_00_model_states.pt")["module"]
    weights = consolidated_weights(step_dir)
    assert weights.keys() == computed_with.keys()
    for name, weight in weights.items():
        assert torch.equal(weight.bfloat16(), computed_with[name]), name
    assert not torch.equal(weights["wte.weight"], computed_with["wte.weight"].float())
    assert weights["lm_head.weight"].data_ptr() == weights["wte.weight"].data_ptr()
