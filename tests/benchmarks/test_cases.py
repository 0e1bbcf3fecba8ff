"""The benchmark compares like with like: every variant computes the same loss and the same gradients."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import BETA_REF, BETA_TEACHER, IGNORE_INDEX, load_inputs, peaked_head, save_inputs, with_teacher
from benchmarks.floor import floor_dtype, measure_floor, products
from benchmarks.measure import measure
from benchmarks.oracle import float64_gradients, relative_error
from benchmarks.variants import BETA, OBJECTIVES, VARIANTS, find_variant

# The maths of Liger and Cut Cross Entropy without waiting for their compilation.
pytestmark = pytest.mark.usefixtures("eager")
PAIRS = [(name, objective) for name, variant in VARIANTS.items() for objective in variant.objectives]


@pytest.fixture
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def inputs():
    hidden, weight, labels = peaked_head(4 * 24, hidden_size=32, vocab_size=301)
    return with_teacher(hidden, weight, labels, top_k=8)


@pytest.fixture(scope="module")
def exact(inputs):
    return {objective: float64_gradients(inputs, objective) for objective in OBJECTIVES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_every_variant_computes_the_same_loss_and_gradients(inputs, exact, name, objective, dtype):
    if (
        dtype == torch.bfloat16
    ):  # the same values, so that the float64 gradients above hold for what bfloat16 can carry
        inputs = inputs._replace(hidden=inputs.hidden.bfloat16(), weight=inputs.weight.bfloat16())
        reference = float64_gradients(inputs, objective)
    else:
        reference = exact[objective]
    result = measure(name, objective, inputs, 1, reference)
    eps = torch.finfo(dtype).eps
    # A logit of size 20 that is rounded to bfloat16 is off by up to 20 eps / 2, and so are probabilities, relatively.
    tolerance = 50 * eps if dtype == torch.float32 else 16 * eps
    tolerance += 8 * VARIANTS[name].tolerance  # of hidden's gradient: see docs/live.md
    assert result["hidden_grad_error"] < tolerance
    assert (result["weight_grad_error"] is None) == VARIANTS[name].frozen
    assert (result["weight_grad_error"] or 0.0) < tolerance
    assert result["loss_error"] < tolerance * max(1.0, abs(exact[objective]["loss"].item()))
    assert result["seconds"][0] > 0


def test_the_oracle_is_the_loss_written_out(inputs, exact):
    """Independently of the variants' own helpers, with teacher and reference one by one instead of their mixture."""
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    labels = inputs.labels.clamp(min=0)
    logps = F.linear(hidden, weight).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    policy = (logps * (inputs.labels != IGNORE_INDEX)).sum(-1)
    reward = BETA_REF * (policy - inputs.ref_logps) + BETA_TEACHER * (policy - inputs.teacher.label_logps.sum(-1))
    loss = -F.logsigmoid(reward[:2] - reward[2:]).mean()
    loss.backward()
    torch.testing.assert_close(exact["dpo"]["loss"], loss.detach(), rtol=1e-6, atol=0)
    assert relative_error(weight.grad, exact["dpo"]["weight_grad"].double()) < 1e-6
    assert relative_error(hidden.grad.flatten(0, 1)[inputs.valid], exact["dpo"]["hidden_grad"].double()) < 1e-6
    assert exact["dpo+kl"]["loss"] > exact["dpo"]["loss"]  # a divergence is positive


def test_the_references_make_liger_comparable(inputs):
    """The mixture reference of a pair's answers is the same, so that leaving it out changes nothing."""
    chosen, rejected = inputs.mixture_logps.chunk(2)
    torch.testing.assert_close(chosen, rejected)
    assert BETA == BETA_REF + BETA_TEACHER
    assert (inputs.ref_logps != inputs.teacher.label_logps.sum(-1)).all()


def test_inputs_survive_the_file_and_the_window_keeps_both_kinds_of_tokens(inputs, tmp_path):
    save_inputs(inputs, tmp_path / "inputs.pt")
    loaded = load_inputs(tmp_path / "inputs.pt")
    for before, after in zip((*inputs[:4], *inputs.teacher), (*loaded[:4], *loaded.teacher), strict=True):
        assert torch.equal(before, after)
    assert inputs.window(4).labels.shape == (4, 4)
    assert inputs.window(4).valid.sum() == 8


def test_peaked_head_is_peaked():
    hidden, weight, labels = peaked_head(256, hidden_size=512, vocab_size=4096)
    probabilities = (hidden @ weight.T).softmax(-1)
    assert 0.2 < probabilities.gather(1, labels[:, None]).mean() < 0.9
    assert probabilities.topk(64).values.sum(-1).mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_arrangement_of_the_floor_does_its_product(inputs, dtype):
    hidden, weight = inputs.hidden.flatten(0, 1)[inputs.valid].to(dtype), inputs.weight.to(dtype)
    arrangements = list(products(hidden, weight))
    hidden, weight = hidden.to(floor_dtype(dtype)), weight.to(floor_dtype(dtype))
    assert {product for product, _, _ in arrangements} == {"logits", "dhidden", "dweight"}
    logits = hidden @ weight.T
    expected = {"logits": logits, "dhidden": logits @ weight, "dweight": logits.T @ hidden}
    for product, name, run in arrangements:
        torch.testing.assert_close(run(), expected[product], msg=lambda text, name=name: f"{name}: {text}")
    best = measure_floor(hidden.to(dtype), weight.to(dtype), calls=1)
    assert all(product["seconds"] > 0 for product in best.values())


def test_unknown_variants_and_objectives_are_refused(inputs):
    with pytest.raises(ValueError, match=r"variant 'libra' is unknown: use one of recompute"):
        find_variant("libra")
    with pytest.raises(ValueError, match=r"'liger' does not compute 'dpo\+kl', only dpo"):
        measure("liger", "dpo+kl", inputs, 1)


def test_a_window_has_answer_tokens_however_much_is_masked(inputs):
    flat = inputs.hidden.flatten(0, 1), inputs.weight, inputs.labels.flatten().clamp(min=0)
    for masked in (0.0, 0.5, 7 / 8):
        some = with_teacher(*flat, top_k=8, masked=masked)
        assert some.valid.sum() == 4 * 24 * (1 - masked)
        assert some.window(4).valid.sum() >= 8
    nothing = with_teacher(*flat, top_k=0)
    assert nothing.teacher.topk_ids.shape == (4, 24, 0)


def test_plans_and_frozen_heads_by_name():
    budget = find_variant("budget=4096,frozen")
    assert (budget.memory_budget, budget.frozen, budget.ours) == (4096, True, True)
    assert find_variant("dense,frozen").frozen
    assert not find_variant("dense").frozen
    assert find_variant("recompute").memory_budget == 0
    with pytest.raises(ValueError, match="'recompute,thawed' is unknown"):
        find_variant("recompute,thawed")
