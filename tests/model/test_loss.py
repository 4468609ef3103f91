import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.data.loss_mask import IGNORE
from megagpt.model.loss import CHUNK_BYTES, chunks, kept_share, next_token_loss, next_token_score, token_nats


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


OPTIONS = [{}, {"z_loss": 0.3}, {"label_smoothing": 0.1}, {"z_loss": 0.3, "label_smoothing": 0.1}]


@pytest.mark.parametrize("options", OPTIONS)
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


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 8 tokens of 50."""
    monkeypatch.setattr("megagpt.model.loss.CHUNK_BYTES", 4 * 50 * 8)


def hidden_states(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 9, 16).to(dtype), torch.randn(50, 16).to(dtype)
    targets = torch.randint(0, 50, (4, 9))
    targets[0, 1:5] = targets[2, 8] = targets[3] = IGNORE  # of the last chunk nothing is kept
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("options", OPTIONS)
def test_in_chunks_loss_and_gradients_are_the_plain_ones(small_chunks, options):
    x, weight, targets = hidden_states()
    plain = next_token_loss(F.linear(x, weight), targets, **options)
    chunked = next_token_score(targets, **options)(x, weight)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    outer = torch.tensor(3.0)  # as of loss scaling
    expected = torch.autograd.grad(plain, (x, weight), outer)
    for found, wanted in zip(torch.autograd.grad(chunked, (x, weight), outer), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens", [1, 7, 36])
def test_a_few_rows_at_a_time_loss_and_gradients_are_the_plain_ones(monkeypatch, options, tokens):
    """As on a CPU; one chunk, which 7 does not divide."""
    monkeypatch.setattr("megagpt.model.loss.ROW_BLOCK_BYTES", 4 * 50 * tokens - 1)
    x, weight, targets = hidden_states()
    plain = next_token_loss(F.linear(x, weight), targets, **options)
    score = next_token_score(targets, **options)(x, weight)
    torch.testing.assert_close(score, plain, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(plain, (x, weight))
    for found, wanted in zip(torch.autograd.grad(score, (x, weight)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_in_chunks_16_bit_gradients_are_about_as_exact_as_the_plain_ones(small_chunks):
    """Against fp32 gradients of the same 16-bit numbers: bf16 keeps 8 bits, and each entry sums over many terms."""
    x, weight, targets = hidden_states(torch.bfloat16)
    exact = torch.autograd.grad(next_token_loss(F.linear(x.float(), weight.float()), targets), (x, weight))
    plain = torch.autograd.grad(next_token_loss(F.linear(x, weight), targets), (x, weight))
    score = next_token_score(targets)(x, weight)
    for found, usual, wanted in zip(torch.autograd.grad(score, (x, weight)), plain, exact, strict=True):
        assert found.dtype == torch.bfloat16
        size = wanted.float().norm()
        assert (found.float() - wanted.float()).norm() / size < 0.01
        # rounded once more, when it is divided by the number of tokens: independent errors add up to a factor of 1.41
        assert (found.float() - wanted.float()).norm() < 1.5 * (usual.float() - wanted.float()).norm()


def test_in_chunks_of_nothing_but_ignored_targets_there_is_no_gradient(small_chunks):
    x, weight, targets = hidden_states()
    loss = next_token_score(torch.full_like(targets, IGNORE), z_loss=0.1, label_smoothing=0.1)(x, weight)
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_in_chunks_no_tensor_is_as_large_as_all_logits(small_chunks):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in tensors)])
            return out

    x, weight, targets = hidden_states()
    with Largest() as chunked:
        next_token_score(targets)(x, weight).backward()
        token_nats(targets.clamp(min=0))(x, weight)
    assert chunked.numel == max(weight.numel(), 8 * 50)
    with Largest() as plain:
        next_token_loss(F.linear(x, weight), targets).backward()
    assert plain.numel == targets.numel() * 50  # the control


def test_evaluation_in_chunks_is_each_tokens_loss(small_chunks):
    x, weight, targets = hidden_states()
    targets = targets.clamp(min=0)
    nats = token_nats(targets)(x, weight)
    assert nats.shape == targets.shape
    assert nats.mean().item() == pytest.approx(next_token_loss(F.linear(x, weight), targets).item(), rel=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 1334, 1335, 65_536])
def test_no_chunk_is_larger_than_allowed(n_tokens):
    n = chunks(n_tokens, 50_304)
    assert -(-n_tokens // n) * 50_304 * 4 <= CHUNK_BYTES
    assert n == 1 or n_tokens * 50_304 * 4 > CHUNK_BYTES


def test_a_small_vocabulary_is_cut_so_that_fp16_can_add_up():
    """Each summand is at most a probability times a normalized state, and their number is bounded."""
    assert chunks(2**15, 256) == 1
    assert chunks(2**17, 256) == 4
