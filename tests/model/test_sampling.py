"""Sampling filters by hand; random numbers of a text's own."""

import pytest
import torch

from megagpt.config.generation import GenerationConfig
from megagpt.model.sampling import BLOCK, penalized, pick, uniforms

EVERY = torch.arange(400, dtype=torch.float64).unsqueeze(1) / 400  # numbers that meet each token likelier than 1/400


def picks(logits, numbers=EVERY, **options):
    cfg = GenerationConfig(**{"temperature": 1.0, "top_k": 0} | options)
    return set(pick(torch.tensor(logits).expand(len(numbers), -1), numbers, cfg).tolist())


def test_filters_by_hand():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    assert picks(logits) == {0, 1, 2, 3}
    assert picks(logits, top_k=2) == {1, 3}
    assert picks(logits, top_p=0.5) == {1}
    assert picks(logits, top_p=0.51) == {1, 3}
    assert picks(logits, top_p=0.96) == {0, 1, 2, 3}
    assert picks(logits, top_k=2, top_p=0.6) == {1}  # of the two that are kept, the likelier one is 0.625
    assert picks(logits, min_p=0.29) == {0, 1, 3}  # 0.29 of the likeliest one's 0.5
    assert picks(logits, min_p=0.31) == {1, 3}
    assert picks(logits, min_p=1.0) == {1}
    assert picks(logits, temperature=2.0, min_p=0.31) == {0, 1, 2, 3}  # the square root of 0.1 is 0.316
    assert picks(logits, temperature=0.0) == picks(logits, temperature=1e-30) == {1}


def test_a_penalty_by_hand():
    logits, seen = torch.tensor([[2.0, 2.0, -1.0, -1.0]]), torch.tensor([[True, False, True, False]])
    assert penalized(logits, seen, 1.25).tolist() == [[pytest.approx(1.6), 2.0, -1.25, -1.0]]


def test_a_pick_is_the_token_whose_part_of_the_distribution_has_the_number():
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(5, -1)
    numbers = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.9999], dtype=torch.float64).unsqueeze(1)
    assert pick(logits, numbers, GenerationConfig(temperature=1.0, top_k=0)).tolist() == [0, 0, 1, 1, 2]


def test_numbers_of_a_text_depend_on_its_seed_alone():
    device = torch.device("cpu")
    together, alone = uniforms([7, 8, 2**64 - 1], device), uniforms([8], device)
    for _ in range(2 * BLOCK + 1):
        u, own = next(together), next(alone)
        assert 0.0 <= u.min() <= u.max() < 1.0
        assert u[1] == own
        assert len(set(u.flatten().tolist())) == 3
