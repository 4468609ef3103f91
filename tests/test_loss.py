import math

import pytest
import torch

from megagpt.loss import kept_share, next_token_loss
from megagpt.rows import IGNORE


def test_loss_by_hand():
    logits = torch.tensor([[[0.0, 0.0, math.log(2.0)], [0.0, 0.0, 0.0]]])  # p = (1/4, 1/4, 1/2) and thirds
    targets = torch.tensor([[2, 0]])
    assert next_token_loss(logits, targets).item() == pytest.approx((math.log(2) + math.log(3)) / 2)


def test_z_loss_adds_the_squared_log_partition_function():
    logits, targets = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)
    extra = next_token_loss(logits, targets, z_loss=0.5) - next_token_loss(logits, targets)
    assert extra.item() == pytest.approx(0.5 * math.log(4) ** 2)


def test_label_smoothing_mixes_with_the_uniform_distribution():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    uniform = -logits.log_softmax(-1).mean()
    plain = next_token_loss(logits, targets)
    assert next_token_loss(logits, targets, label_smoothing=0.1).item() == pytest.approx(
        (0.9 * plain + 0.1 * uniform).item(), rel=1e-5
    )


def test_a_bf16_models_loss_is_not_rounded_to_bf16():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 50).bfloat16(), torch.randint(0, 50, (2, 3))
    loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() != loss.bfloat16().item()


@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.3}, {"label_smoothing": 0.1}, {"z_loss": 0.3, "label_smoothing": 0.1}]
)
def test_ignored_targets_are_as_if_they_were_not_there(options):
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    targets[0, 1] = targets[1, 0] = targets[1, 4] = IGNORE
    kept = targets != IGNORE
    expected = next_token_loss(logits[kept].unsqueeze(0), targets[kept].unsqueeze(0), **options)
    assert next_token_loss(logits, targets, **options).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_without_any_target_has_no_loss_and_no_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = next_token_loss(logits, torch.full((2, 3), IGNORE), z_loss=0.1, label_smoothing=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_every_kept_target_weighs_the_same_in_whichever_micro_batch():
    """The mean over micro-batches of loss x kept share, as in a training step, whole and in two unequal parts."""
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, 5, requires_grad=True), torch.randint(0, 5, (4, 6))
    targets[:2, 1:] = IGNORE
    [whole] = torch.autograd.grad(next_token_loss(logits, targets) * kept_share(targets), logits)
    halves = [
        next_token_loss(part, wanted) * kept_share(wanted)
        for part, wanted in zip(logits.split(2), targets.split(2), strict=True)
    ]
    [parts] = torch.autograd.grad(sum(halves) / 2, logits)
    torch.testing.assert_close(parts, whole)


def test_without_ignored_targets_the_loss_is_torchs_mean_to_the_last_bit():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, 50), torch.randint(0, 50, (4, 6))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert kept_share(targets).item() == 1.0
    assert torch.equal(next_token_loss(logits, targets) * kept_share(targets), expected)
