"""`dadpo_loss` against TRL's own code, through the identity that turns daDPO into DPO with a mixed reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dadpo_kernels import dadpo_loss
from tests.support.trl_oracle import trl_dpo

LOSS_TYPES = ["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"]
PAIRS, TOKENS = 5, 7


def answers(seed=0):
    """Per-token log-probabilities of policy, reference and teacher `[2B, T]` (0 where masked), and the mask."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, TOKENS + 1, (2 * PAIRS, 1), generator=g)
    mask = torch.arange(TOKENS) < lengths
    logps = -torch.rand(3, 2 * PAIRS, TOKENS, generator=g, dtype=torch.float64) * 4 * mask
    return *logps.unbind(), mask


def ours(policy, ref, teacher, mask, **options):
    lengths = mask.sum(-1)
    return dadpo_loss(
        *policy.sum(-1).chunk(2), *ref.sum(-1).chunk(2), *teacher.sum(-1).chunk(2),
        chosen_lengths=lengths[:PAIRS], rejected_lengths=lengths[PAIRS:], **options,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(
    seed=st.integers(0, 2**31),
    beta_ref=st.sampled_from([0.0, 0.03, 0.5, 2.0]),
    beta_teacher=st.sampled_from([0.01, 0.1, 1.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_equals_trl_with_the_mixed_reference(loss_type, seed, beta_ref, beta_teacher, smoothing):
    smoothing = smoothing if loss_type == "robust" else 0.0
    policy, ref, teacher, mask = answers(seed)
    beta = beta_ref + beta_teacher
    mixed = (beta_ref * ref + beta_teacher * teacher).sum(-1) / beta

    x = policy.clone().requires_grad_()
    expected, metrics = trl_dpo(x, mask, mixed, beta, [loss_type], label_smoothing=smoothing)
    (expected_grad,) = torch.autograd.grad(expected, x)
    y = policy.clone().requires_grad_()
    out = ours(
        y, ref, teacher, mask, beta_ref=beta_ref, beta_teacher=beta_teacher, loss_type=loss_type,
        label_smoothing=smoothing,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.losses.mean(), y)

    assert out.losses.dtype == torch.float64
    torch.testing.assert_close(out.losses.mean(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-14)
    assert not out.chosen_rewards.requires_grad
    assert out.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-12)
    assert out.rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=1e-12)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_smoothing_mixes_the_loss_with_that_of_the_swapped_pair(loss_type):
    policy, ref, teacher, mask = answers()
    betas = {"beta_ref": 0.4, "beta_teacher": 0.3, "loss_type": loss_type}
    plain = ours(policy, ref, teacher, mask, **betas).losses
    swapped = ours(*(x.roll(PAIRS, 0) for x in (policy, ref, teacher, mask)), **betas).losses
    smoothed = ours(policy, ref, teacher, mask, label_smoothing=0.2, **betas).losses
    assert (plain - swapped).abs().min() > 1e-3
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * swapped, rtol=1e-13, atol=1e-13)


def test_robust_loss_is_unbiased_under_flipped_labels():
    policy, ref, teacher, mask = answers()
    betas = {"beta_ref": 0.4, "beta_teacher": 0.3}
    flipped = [x.roll(PAIRS, 0) for x in (policy, ref, teacher, mask)]
    robust = {"loss_type": "robust", "label_smoothing": 0.2}
    seen = ours(policy, ref, teacher, mask, **betas, **robust).losses
    seen_flipped = ours(*flipped, **betas, **robust).losses
    clean = ours(policy, ref, teacher, mask, **betas).losses
    torch.testing.assert_close(0.8 * seen + 0.2 * seen_flipped, clean, rtol=1e-13, atol=1e-13)


def test_a_model_with_weight_zero_is_not_read():
    c, r, other_c, other_r = -torch.rand(4, PAIRS, dtype=torch.float64)
    by_ref = dadpo_loss(c, r, other_c, other_r, None, None, beta_ref=0.3, beta_teacher=0)
    by_teacher = dadpo_loss(c, r, None, None, other_c, other_r, beta_ref=0, beta_teacher=0.3)
    nan = torch.full_like(c, torch.nan)
    torch.testing.assert_close(by_ref, by_teacher, rtol=0, atol=0)
    torch.testing.assert_close(
        dadpo_loss(c, r, other_c, other_r, nan, nan, beta_ref=0.3, beta_teacher=0), by_ref, rtol=0, atol=0
    )


@pytest.mark.parametrize("margin", [-1e4, 1e4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge"])
def test_margins_too_large_for_exp(loss_type, margin):
    chosen = torch.tensor([margin], requires_grad=True)
    zero = torch.zeros(1)
    loss = dadpo_loss(chosen, zero, zero, zero, None, None, beta_ref=1, beta_teacher=0, loss_type=loss_type).losses
    loss.backward()
    assert loss.item() == pytest.approx(max(0, -margin), rel=1e-3)
    assert chosen.grad.item() == (-1 if margin < 0 else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_ref": -0.1}, "beta_ref must be finite and not negative, got -0.1"),
        ({"beta_teacher": float("nan")}, "beta_teacher must be finite and not negative, got nan"),
        ({"beta_ref": 0, "beta_teacher": 0}, "both 0"),
        (
            {"loss_type": "sigmod"},
            "unknown loss_type 'sigmod': choose one of sigmoid, sigmoid_norm, robust, hinge, ipo",
        ),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "loss_type='ipo' has no label smoothing"),
        ({"loss_type": "ipo"}, "loss_type='ipo' needs chosen_lengths and rejected_lengths"),
        ({"ref_rejected_logps": None}, "beta_ref=1 needs ref_chosen_logps and ref_rejected_logps"),
        ({"teacher_chosen_logps": None}, "beta_teacher=1 needs teacher_chosen_logps"),
        ({"rejected_logps": torch.zeros(4)}, r"rejected_logps has shape \[4\]"),
        ({"ref_chosen_logps": torch.zeros(3, 1)}, r"ref_chosen_logps has shape \[3, 1\]"),
        (
            {"loss_type": "ipo", "chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(1)},
            "rejected_lengths has",
        ),
        (
            {"loss_type": "ipo", "chosen_lengths": torch.tensor([2, 0, 1]), "rejected_lengths": torch.ones(3)},
            "_lengths.1.",
        ),
    ],
)
def test_bad_arguments(options, message):
    names = [f"{model}{answer}_logps" for model in ("", "ref_", "teacher_") for answer in ("chosen", "rejected")]
    good = {name: torch.zeros(3) for name in names} | {"beta_ref": 1, "beta_teacher": 1}
    dadpo_loss(**good)
    with pytest.raises(ValueError, match=message):
        dadpo_loss(**(good | options))


def test_half_precision_sums_are_refused():
    x, half = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"ref_chosen_logps is torch\.bfloat16"):
        dadpo_loss(x, x, half, half, None, None, beta_ref=1, beta_teacher=0)
