from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.permutation import permute
from megagpt.data.sampler import PERIOD, DatasetPosition, Sampler, SampleSpans, Segment, shares_of

keys = st.integers(0, 2**63)


def first_segment(weights: Sequence[float], seq_len: int) -> Segment:
    return Segment(0, seq_len, shares_of(weights), (DatasetPosition(),) * len(weights))


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


def plain(n_tokens, weights=(1.0,), seq_len=10, seed=1) -> Sampler:
    """From the first sample on; one variant of each dataset."""
    return Sampler(tuple((n,) for n in n_tokens), first_segment(weights, seq_len), seed)


def n_windows(n_tokens: int, seq_len: int) -> int:
    return (n_tokens - 1) // seq_len - 1


def test_an_epoch_visits_every_window_once():
    windows = plain([1000]).draw(0, 98)
    assert n_windows(1000, 10) == 98
    assert set(windows.epoch) == {0}
    assert set(windows.length) == {10}
    phase = windows.start.min()
    assert 0 <= phase < 10
    assert sorted(windows.start) == [phase + 10 * i for i in range(98)]


def test_no_two_epochs_cut_alike_or_come_in_the_same_order():
    sampler, n = plain([100_003], seq_len=100), n_windows(100_003, 100)
    epochs = [sampler.draw(e * n, n).start for e in range(4)]
    assert len({int(starts.min()) for starts in epochs}) == 4
    ranks = [np.argsort(np.argsort(starts)) for starts in epochs]
    assert abs(np.corrcoef(ranks[0], ranks[1])[0, 1]) < 0.1


@given(st.integers(3, 5000), st.integers(1, 50), st.integers(0, 10**9), st.integers(0, 2**32))
def test_a_window_never_leaves_the_data(n_tokens, seq_len, first, seed):
    if n_tokens < 2 * seq_len + 1:
        return
    windows = plain([n_tokens], seq_len=seq_len, seed=seed).draw(first, 50)
    assert windows.start.min() >= 0
    assert windows.start.max() + seq_len + 1 <= n_tokens


def rows(drawn: SampleSpans) -> list[list[tuple[int, ...]]]:
    """For each sample its stretches."""
    columns = [column.tolist() for column in (drawn.dataset, drawn.epoch, drawn.start, drawn.length)]
    stretches = list(zip(*columns, strict=True))
    begin = drawn.begin.tolist()
    return [stretches[a:b] for a, b in pairwise(begin)]


variants = st.lists(st.integers(121, 400), min_size=1, max_size=3).map(tuple)


@st.composite
def segments(draw, n_datasets=2, first_sample=0):
    """A segment in the middle of a run: every dataset has stopped somewhere in an epoch, which had other windows."""
    places = []
    for _ in range(n_datasets):
        epoch, seq_len = draw(st.integers(0, 5)), draw(st.integers(1, 60))
        place = DatasetPosition(epoch, draw(st.integers(1, seq_len)), seq_len, draw(st.integers(0, seq_len - 1)))
        places.append(draw(st.sampled_from([DatasetPosition(epoch), place])))
    share = draw(st.integers(1, PERIOD - 1))
    return Segment(first_sample, draw(st.integers(1, 60)), (share, PERIOD - share), tuple(places))


cuts_of_a_stretch = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(st.tuples(variants, variants), segments(), st.integers(0, 10**6), cuts_of_a_stretch)
def test_a_sample_does_not_depend_on_how_they_are_drawn(n_tokens, segment, first, cuts):
    sampler = Sampler(n_tokens, segment, 7)
    whole = rows(sampler.draw(first, sum(cuts)))
    begins = np.cumsum([first, *cuts])[:-1].tolist()
    assert whole == [row for begin, n in zip(begins, cuts, strict=True) for row in rows(sampler.draw(begin, n))]


@given(st.tuples(variants, variants), segments(), st.integers(0, 3000))
def test_a_segment_cut_in_two_at_any_sample_is_one_line_still(n_tokens, segment, at):
    """The second half, begun anew from the places, draws what the whole would have drawn from each dataset."""
    whole = Sampler(n_tokens, segment, 7)
    later = Segment(at, segment.seq_len, segment.shares, whole.places(at))
    second = Sampler(n_tokens, later, 7)
    expected, got = rows(whole.draw(at, 60)), rows(second.draw(at, 60))
    for k in (0, 1):
        of_k = [[row for row in drawn if row[0][0] == k] for drawn in (expected, got)]
        n = min(map(len, of_k))
        assert of_k[0][:n] == of_k[1][:n]


@given(st.tuples(variants, variants), segments(), st.integers(0, 10**12))
def test_a_far_sample_is_drawn_as_fast_as_a_near_one_and_alike_by_a_fresh_sampler(n_tokens, segment, far):
    used = Sampler(n_tokens, segment, 7)
    used.draw(0, 10)
    assert rows(used.draw(far, 3)) == rows(Sampler(n_tokens, segment, 7).draw(far, 3))


def test_epochs_take_the_variants_in_turn_each_with_its_own_length():
    sampler = Sampler(((1000, 600, 800),), first_segment((1.0,), 10), 1)
    sizes = [n_windows(n, 10) for n in (1000, 600, 800)]
    drawn = sampler.draw(0, 2 * sum(sizes))
    assert np.bincount(drawn.epoch).tolist() == sizes * 2
    for epoch, n in enumerate((1000, 600, 800) * 2):
        starts = drawn.start[drawn.epoch == epoch]
        assert len(set(starts.tolist())) == len(starts)
        assert starts.max() + 11 <= n


def test_samples_of_another_length_are_cut_from_the_rest_of_the_epoch_by_hand():
    """16 tokens are 2 windows of 5, of which the first 3 inputs are read; then samples of 4.

    Left are 7 inputs: a sample of 4 (2 of the window begun, 2 of the other), and 3 that wait for one from epoch 1.
    That has 2 windows of 4: 1 input, the other window whole, and then the 3 left of the first.
    """
    old = plain([16], seq_len=5).draw(0, 2).start.tolist()
    sampler = Sampler(((16,),), Segment(10, 4, (PERIOD,), (DatasetPosition(0, 3, 5, 0),)), 1)
    new = plain([16], seq_len=4).draw(2, 3).start.tolist()
    assert rows(sampler.draw(10, 4)) == [
        [(0, 0, old[0] + 3, 2), (0, 0, old[1], 2)],
        [(0, 0, old[1] + 2, 3), (0, 1, new[0], 1)],
        [(0, 1, new[1], 4)],
        [(0, 1, new[0] + 1, 3), (0, 2, new[2], 1)],
    ]
    assert sampler.places(12) == (DatasetPosition(1, 1, 4, 1),)
    assert sampler.places(13) == (DatasetPosition(1, 5, 4, 1),)
    assert sampler.places(14) == (DatasetPosition(2, 1, 4, 1),)
    assert sampler.epochs(12) == [1 + 1 / 8]


def test_weights_are_exact_over_a_period():
    windows = plain([5000, 900, 700], (3.0, 1.0, 4.0), 16, 7).draw(3 * PERIOD, PERIOD)
    assert np.bincount(windows.dataset).tolist() == [3 * PERIOD // 8, PERIOD // 8, PERIOD // 2]


def test_each_dataset_goes_through_its_own_epochs_in_step_with_its_weight():
    windows = plain([5000, 900], (3.0, 1.0), 16, 7).draw(0, 2 * PERIOD)
    for k, n_tokens in enumerate((5000, 900)):
        mine = windows.dataset == k
        visits = np.bincount(windows.epoch[mine])
        assert (visits[:-1] == n_windows(n_tokens, 16)).all()
        for epoch in range(3):
            assert len(set(windows.start[mine & (windows.epoch == epoch)])) == n_windows(n_tokens, 16)


def test_no_phase_comes_again_before_all_have_come():
    sampler, n = plain([100_003], seq_len=64), n_windows(100_003, 64)
    phases = [int(sampler.draw(epoch * n, n).start.min()) for epoch in range(64)]
    assert sorted(phases) == list(range(64))


def test_another_seed_gives_another_order():
    assert not np.array_equal(plain([1000], seed=1).draw(0, 50).start, plain([1000], seed=2).draw(0, 50).start)


def test_the_order_is_pinned():
    """A change here means that no earlier run can be resumed: raise the checkpoint version with it."""
    windows = plain([5000, 900], (3.0, 1.0), 16, 7).draw(10**9, 6)
    assert windows.dataset.tolist() == [0, 0, 0, 0, 0, 0]
    assert windows.start.tolist() == [1707, 3035, 3051, 747, 3003, 1643]
