import math

import pytest
import torch

from megagpt.loss import next_token_loss


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
