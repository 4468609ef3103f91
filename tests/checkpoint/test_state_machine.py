"""A run without an engine, told to train, evaluate, save, die, rot and go on in any order: what it must always be."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megagpt.checkpoint.commit import (
    best,
    commit_on_record,
    committed,
    damage_of,
    newest_record,
    step_folder,
    update_latest_and_best,
    write_commit,
    write_rank_manifest,
)
from megagpt.checkpoint.identity import Identity
from megagpt.checkpoint.rotation import prune, quarantine_steps
from megagpt.config.regularization import EarlyStoppingConfig
from megagpt.config.schema import KeepConfig
from megagpt.data.mixture import Mixture, Source
from megagpt.train.early_stopping import EarlyStopping, after_evaluation
from megagpt.train_state import TrainState

STOPPING = EarlyStoppingConfig(patience=3, min_delta=0.5)
SOURCES = [(Source("a", "fa", (4000, 4100)), 3.0), (Source("b", "fb", (2500,)), 1.0)]

IDENTITY = Identity(1, 1, "none", "fp32", {}, 128, "0" * 64, {}, "matrices")


class Run(RuleBasedStateMachine):
    """`told` is what a run that never died would have seen up to this state: its samples and its evaluations."""

    @initialize(last=st.integers(2, 4), every=st.integers(0, 3), n_best=st.integers(1, 2))
    def begin(self, last, every, n_best):
        self.out_dir = Path(tempfile.mkdtemp(prefix="state_machine_"))
        self.keep = KeepConfig(last=last, every=every, best=n_best)
        self.state, self.mixture = TrainState(), self._mixture(Mixture(seed=7), TrainState(), 4)
        self.batch, self.evaluations, self.drawn = 4, [], []
        self.saved = {}  # step -> what was told when it was saved

    @staticmethod
    def _mixture(before, state, batch):
        return before.continued(SOURCES, step=state.step, sample=state.samples_seen, seq_len=16, global_batch=batch)

    @rule(n=st.integers(1, 9))
    def train(self, n):
        for _ in range(n):
            taken = self.mixture.samples_of(self.state.step + 1)
            assert taken == range(self.state.samples_seen, self.state.samples_seen + self.batch)
            windows = self.mixture.sampler(taken.start).draw(taken.start, len(taken))
            rows = zip(windows.dataset, windows.epoch, windows.start, windows.length, strict=True)
            self.drawn += [tuple(map(int, row)) for row in rows]
            self.state = self.state.after_step(self.batch, 16)

    @precondition(lambda self: self.state.step > (self.evaluations[-1][0] if self.evaluations else 0))
    @rule(loss=st.floats(1.0, 9.0))
    def evaluate(self, loss):
        stopper = after_evaluation(self.state.stopper, loss, self.state.step, self.state.tokens_seen, STOPPING)
        self.state = replace(self.state, val_loss=loss, stopper=stopper)
        self.evaluations.append((self.state.step, self.state.tokens_seen, loss))

    @precondition(lambda self: not step_folder(self.out_dir, self.state.step).exists())
    @rule(dies=st.sampled_from(["no", "before COMMIT", "before rotation"]))
    def save(self, dies):
        step_dir = step_folder(self.out_dir, self.state.step)
        step_dir.mkdir(parents=True)
        (step_dir / "model.pt").write_text(json.dumps(self.drawn))
        manifest = write_rank_manifest(step_dir, 0)
        if dies != "before COMMIT":
            write_commit(step_dir, self.state, self.mixture, IDENTITY, [manifest])
            self.saved[self.state.step] = (self.state, self.mixture, [*self.drawn], [*self.evaluations])
            update_latest_and_best(self.out_dir, step_dir, self.state)
        if dies == "no":
            prune(self.out_dir, self.keep)
        else:
            self.go_on()

    @rule(batch=st.sampled_from([2, 4, 6]))
    def go_on(self, batch=4):
        """Die and start again, with another global batch perhaps."""
        record = newest_record(self.out_dir)
        step = record.state.step if record else 0
        expected = self.saved.get(step, (TrainState(), Mixture(seed=7), [], []))
        if record:
            assert (record.state, record.mixture) == expected[:2]
            assert json.loads((record.step_dir / "model.pt").read_text()) == [list(row) for row in expected[2]]
        self.state, mixture, self.drawn, self.evaluations = expected[0], expected[1], [*expected[2]], [*expected[3]]
        self.batch, self.mixture = batch, self._mixture(mixture, self.state, batch)

    @precondition(lambda self: len(committed(self.out_dir)) > 1)
    @rule()
    def rot(self):
        """The newest step is damaged: it is put aside, and the run goes on from the one before."""
        newest = committed(self.out_dir)[-1]
        (newest / "model.pt").write_text("[]")
        assert damage_of(newest, 0) is not None
        quarantine_steps([newest])
        self.go_on()

    @invariant()
    def early_stopping_is_that_of_a_run_that_never_died(self):
        state = EarlyStopping()
        for step, tokens_seen, loss in self.evaluations:
            state = after_evaluation(state, loss, step, tokens_seen, STOPPING)
        assert self.state.stopper == state

    @invariant()
    def each_window_is_read_once(self):
        """In the history that counts: what was trained after the step that a run went back to does not."""
        assert len(self.drawn) >= self.state.samples_seen
        assert len(set(self.drawn)) == len(self.drawn)

    @invariant()
    def what_is_committed_is_whole(self):
        steps = committed(self.out_dir)
        assert all(damage_of(step_dir, 0) is None for step_dir in steps)
        assert (commit_on_record(self.out_dir) is not None) == bool(self.saved)
        assert best(self.out_dir) is None or best(self.out_dir) in steps

    def teardown(self):
        shutil.rmtree(self.out_dir)


Run.TestCase.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
TestRun = Run.TestCase
