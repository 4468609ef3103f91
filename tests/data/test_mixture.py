import json
from collections import Counter, defaultdict
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.mixture import Mixture, Source
from megagpt.data.sampler import PERIOD, DatasetPosition
from megagpt.errors import UserError

A, B, C = (Source(f"data/{name}", name * 64, n) for name, n in (("a", (300,)), ("b", (140, 200)), ("c", (121,))))


def begun(*wanted, seq_len=10, global_batch=8) -> Mixture:
    return Mixture(7).continued(wanted, step=0, sample=0, seq_len=seq_len, global_batch=global_batch)


def inputs(mixture: Mixture, first: int, count: int) -> list[list[tuple[str, int, int]]]:
    """For each sample its inputs: dataset, epoch, place in the stream."""
    drawn = mixture.sampler(first).draw(first, count)
    stretches = list(zip(drawn.dataset, drawn.epoch, drawn.start, drawn.length, strict=True))
    return [
        [
            (mixture.sources[k].path, int(epoch), int(token))
            for k, epoch, start, length in stretches[begin:end]
            for token in range(start, start + length)
        ]
        for begin, end in pairwise(drawn.begin)
    ]


changes = st.lists(
    st.fixed_dictionaries(
        {
            "weights": st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3).filter(any),
            "seq_len": st.sampled_from([1, 7, 8, 16, 20, 60]),
            "global_batch": st.integers(1, 12),
            "steps": st.integers(0, 12),
        }
    ),
    min_size=1,
    max_size=6,
)


@given(changes)
def test_over_any_history_every_token_of_every_finished_epoch_is_an_input_exactly_once(history):
    mixture, step, sample, seen = Mixture(7), 0, 0, Counter()
    for change in history:
        wanted = [(source, weight) for source, weight in zip((A, B, C), change["weights"], strict=True) if weight]
        sizes = {"seq_len": change["seq_len"], "global_batch": change["global_batch"]}
        mixture = mixture.continued(wanted, step=step, sample=sample, **sizes)
        mixture = Mixture.from_json(json.loads(json.dumps(mixture.as_json())))
        count = change["steps"] * change["global_batch"]
        if count:
            assert mixture.samples_of(step + 1) == range(sample, sample + change["global_batch"])
            drawn = inputs(mixture, sample, count)
            assert all(len(row) == change["seq_len"] for row in drawn)
            seen.update(token for row in drawn for token in row)
        step, sample = step + change["steps"], sample + count
    assert set(seen.values()) <= {1}
    by_epoch = defaultdict(list)
    for path, epoch, token in seen:
        by_epoch[path, epoch].append(token)
    for source, place in zip(mixture.sources, mixture.places(sample), strict=True):
        for epoch in range(place.epoch):
            tokens = sorted(by_epoch[source.path, epoch])
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))  # without a gap
            n = source.n_tokens[epoch % len(source.n_tokens)]
            whole = {((n - 1) // change["seq_len"] - 1) * change["seq_len"] for change in history}
            assert len(tokens) in whole  # all windows of one of the lengths
        assert len(by_epoch[source.path, place.epoch]) == place.offset


def test_a_change_of_the_global_batch_alone_changes_no_sample():
    before = begun((A, 1.0), (B, 3.0))
    after = before.continued([(A, 1.0), (B, 3.0)], step=5, sample=40, seq_len=10, global_batch=16)
    assert after.segments == before.segments
    assert [after.samples_of(step) for step in (1, 5, 6, 7)] == [
        range(0, 8),
        range(32, 40),
        range(40, 56),
        range(56, 72),
    ]


def test_the_order_of_the_run_file_and_the_folders_do_not_matter():
    before = begun((A, 1.0), (B, 3.0))
    moved = Source("elsewhere/b", B.fingerprint, B.n_tokens)
    after = before.continued([(moved, 6.0), (A, 2.0)], step=5, sample=40, seq_len=10, global_batch=8)
    assert after.segments == before.segments
    assert [source.path for source in after.sources] == ["data/a", "elsewhere/b"]


def test_a_dataset_that_was_left_out_goes_on_where_it_was():
    mixture = begun((A, 1.0), (B, 1.0))
    mixture = mixture.continued([(A, 1.0), (C, 1.0)], step=10, sample=80, seq_len=10, global_batch=8)
    stopped = mixture.places(80)[1]
    assert stopped.offset > 0
    assert mixture.places(10_000)[1] == stopped
    assert mixture.places(80)[2] == DatasetPosition()  # a new one begins at its beginning
    mixture = mixture.continued([(B, 1.0)], step=20, sample=160, seq_len=10, global_batch=8)
    assert mixture.segments[-1].shares == (0, PERIOD, 0)
    assert mixture.places(160)[1] == stopped


def test_samples_of_the_past_are_what_they_were():
    mixture = begun((A, 1.0), (B, 3.0))
    past = inputs(mixture, 0, 40)
    later = mixture.continued([(C, 1.0)], step=5, sample=40, seq_len=20, global_batch=8)
    assert inputs(later, 0, 40) == past


def test_what_a_draw_needs_is_less_than_a_kilobyte():
    """The newest segment, of 12 datasets of a trillion tokens; with 3 of them the whole history of two segments."""
    many = [(Source(f"data/{k}", f"{k:064x}", (10**12,)), 1.0 + k) for k in range(12)]
    mixture = begun(*many, seq_len=2048)
    for step in (100_000, 200_000):
        sizes = {"seq_len": 4096 + step, "global_batch": 2048}
        mixture = mixture.continued(many, step=step, sample=step * 2048, **sizes)
    newest = mixture.as_json()["segments"][-1]
    assert all(place[1] > 0 for place in newest["places"])
    assert len(json.dumps(newest)) < 1000
    mixture = begun(*many[:3], seq_len=2048).continued(many[:2], step=9, sample=10**9, seq_len=4096, global_batch=8)
    assert len(json.dumps(mixture.as_json())) < 1000


def test_data_rebuilt_under_its_path_is_refused_and_elsewhere_is_another_dataset():
    rebuilt = Source(A.path, "d" * 64, (500,))
    go_on = {"step": 5, "sample": 40, "seq_len": 10, "global_batch": 8}
    with pytest.raises(UserError, match=r"data/a was rebuilt.*aaaaaaaaaaaa then, dddddddddddd now.*another path"):
        begun((A, 1.0)).continued([(rebuilt, 1.0)], **go_on)
    elsewhere = Source("data/new", rebuilt.fingerprint, rebuilt.n_tokens)
    assert begun((A, 1.0)).continued([(elsewhere, 1.0)], **go_on).segments[-1].shares == (0, PERIOD)
    renamed = Source("data/old", A.fingerprint, A.n_tokens)
    assert len(begun((A, 1.0)).continued([(rebuilt, 1.0), (renamed, 1.0)], **go_on).sources) == 2


def test_a_dataset_listed_twice_is_refused():
    with pytest.raises(UserError, match=r"twice, data/a and data/copy: list it once"):
        begun((A, 1.0), (Source("data/copy", A.fingerprint, A.n_tokens), 1.0))


def test_data_shorter_than_two_windows_is_refused_with_the_length_that_fits():
    with pytest.raises(UserError, match=r"data/b has 140 tokens.*set megagpt.data.seq_len to 69"):
        begun((A, 1.0), (B, 1.0), seq_len=100)


def test_a_weight_that_would_never_be_drawn_is_refused():
    with pytest.raises(UserError, match="data/b has weight 1e-09"):
        begun((A, 1.0), (B, 1e-9))


def test_json_keeps_everything():
    mixture = begun((A, 1.0), (B, 3.0)).continued([(C, 1.0)], step=5, sample=40, seq_len=20, global_batch=8)
    assert Mixture.from_json(json.loads(json.dumps(mixture.as_json()))) == mixture
    assert set(asdict(mixture)) == set(mixture.as_json())
