import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import UserError
from megagpt.sampler import PERIOD, Sampler, permute

keys = st.integers(0, 2**63)


@given(st.integers(1, 3000), keys)
def test_permute_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(st.integers(1, 10**15), keys, st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
def test_permute_of_one_value_does_not_depend_on_the_others(n, key, values):
    values = np.array([v % n for v in values])
    together = permute(values, n, key)
    assert ((together >= 0) & (together < n)).all()
    assert together.tolist() == [permute(values[i : i + 1], n, key)[0] for i in range(len(values))]


def test_every_place_is_equally_likely():
    """Chi-square over 4,000 keys of where 0 goes in range(10): below the 99.9th percentile for 9 degrees, 27.9."""
    places = np.bincount([permute(np.zeros(1, dtype=np.int64), 10, key)[0] for key in range(4000)], minlength=10)
    assert ((places - 400) ** 2 / 400).sum() < 27.9


def one(n_tokens=1000, seq_len=10, seed=1) -> Sampler:
    return Sampler((n_tokens,), (1.0,), seq_len, seed)


def test_an_epoch_visits_every_window_once():
    sampler = one()
    windows = sampler.draw(0, sampler.n_windows(0))
    assert sampler.n_windows(0) == 98
    assert set(windows.epoch) == {0}
    phase = windows.start.min()
    assert 0 <= phase < 10
    assert sorted(windows.start) == [phase + 10 * i for i in range(98)]


def test_no_two_epochs_cut_alike_or_come_in_the_same_order():
    sampler = Sampler((100_003,), (1.0,), 100, 1)
    n = sampler.n_windows(0)
    epochs = [sampler.draw(e * n, n).start for e in range(4)]
    assert len({int(starts.min()) for starts in epochs}) == 4
    ranks = [np.argsort(np.argsort(starts)) for starts in epochs]
    assert abs(np.corrcoef(ranks[0], ranks[1])[0, 1]) < 0.1


@given(st.integers(3, 5000), st.integers(1, 50), st.integers(0, 10**9), st.integers(0, 2**32))
def test_a_window_never_leaves_the_data(n_tokens, seq_len, first, seed):
    if n_tokens < 2 * seq_len + 1:
        return
    windows = Sampler((n_tokens,), (1.0,), seq_len, seed).draw(first, 50)
    assert windows.start.min() >= 0
    assert windows.start.max() + seq_len + 1 <= n_tokens


@given(st.integers(0, 10**7), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_sample_does_not_depend_on_how_they_are_drawn(first, cuts):
    sampler = Sampler((5000, 900), (3.0, 1.0), 16, 7)
    whole = sampler.draw(first, sum(cuts))
    begins = np.cumsum([first, *cuts])[:-1]
    parts = [sampler.draw(int(begin), n) for begin, n in zip(begins, cuts, strict=True)]
    assert np.array_equal(whole.start, np.concatenate([p.start for p in parts]))
    assert np.array_equal(whole.dataset, np.concatenate([p.dataset for p in parts]))


def test_weights_are_exact_over_a_period():
    windows = Sampler((5000, 900, 700), (3.0, 1.0, 4.0), 16, 7).draw(3 * PERIOD, PERIOD)
    assert np.bincount(windows.dataset).tolist() == [3 * PERIOD // 8, PERIOD // 8, PERIOD // 2]


def test_each_dataset_goes_through_its_own_epochs_in_step_with_its_weight():
    sampler = Sampler((5000, 900), (3.0, 1.0), 16, 7)
    windows = sampler.draw(0, 2 * PERIOD)
    for k in (0, 1):
        mine = windows.dataset == k
        visits = np.bincount(windows.epoch[mine])
        assert (visits[:-1] == sampler.n_windows(k)).all()
        for epoch in range(3):
            assert len(set(windows.start[mine & (windows.epoch == epoch)])) == sampler.n_windows(k)


def test_no_phase_comes_again_before_all_have_come():
    sampler = Sampler((100_003,), (1.0,), 64, 1)
    n = sampler.n_windows(0)
    phases = [int(sampler.draw(epoch * n, n).start.min()) for epoch in range(64)]
    assert sorted(phases) == list(range(64))


def test_another_seed_gives_another_order():
    assert not np.array_equal(one(seed=1).draw(0, 50).start, one(seed=2).draw(0, 50).start)


def test_the_order_is_pinned():
    """A change here means that no earlier run can be resumed: raise the checkpoint version with it."""
    windows = Sampler((5000, 900), (3.0, 1.0), 16, 7).draw(10**9, 6)
    assert windows.dataset.tolist() == [0, 0, 0, 0, 0, 0]
    assert windows.start.tolist() == [1707, 3035, 3051, 747, 3003, 1643]


def test_data_shorter_than_two_windows_is_refused_with_the_length_that_fits():
    with pytest.raises(UserError, match=r"dataset 0 has 100 tokens.*lower seq_len to 49"):
        one(n_tokens=100, seq_len=64)


def test_a_weight_that_would_never_be_drawn_is_refused():
    with pytest.raises(UserError, match="dataset 1 has weight 1e-09"):
        Sampler((1000, 1000), (1.0, 1e-9), 10, 1)
