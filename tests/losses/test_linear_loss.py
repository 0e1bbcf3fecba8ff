"""The whole loss against a dense float64 one written as the formulas read, and against TRL's own DPO code."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dadpo_kernels import Head, LinearDaDPOLoss, TeacherTargets, linear_dadpo_loss, pair_counts
from dadpo_kernels.losses import linear_loss
from tests.support.trl_oracle import trl_dpo

F64 = torch.float64
BETAS = {"beta_ref": 0.3, "beta_teacher": 0.2}


def make(seed=0, pairs=3, tokens=5, width=6, vocabulary=17, k=4, lengths=None, dtype=F64):
    """A random batch: the tensors arguments of `linear_dadpo_loss`, all leaves that need no gradient yet."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * pairs
    hidden, teacher_hidden, ref_hidden = torch.randn(3, rows, tokens, width, generator=g, dtype=dtype)
    weight, teacher_weight, ref_weight = torch.randn(3, vocabulary, width, generator=g, dtype=dtype)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=g) if lengths is None else torch.tensor(lengths)
    labels = torch.randint(vocabulary, (rows, tokens), generator=g)
    labels[torch.arange(tokens) >= lengths[:, None]] = -100
    y = labels.clamp(min=0)[..., None]
    valid = labels != -100

    def of_labels(logps):
        return logps.gather(-1, y)[..., 0] * valid

    teacher = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    topk, ids = teacher.topk(k)
    tail = teacher.scatter(-1, ids, -torch.inf).logsumexp(-1)
    targets = of_labels(teacher), ids, topk * valid[..., None], tail * valid
    return {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "ref_logps": of_labels((ref_hidden @ ref_weight.T).log_softmax(-1)).sum(-1),
        "teacher": TeacherTargets(*targets),
    }


def dense(
    hidden, weight, labels, *, ref_logps, teacher, beta_ref, beta_teacher, loss_type="sigmoid", label_smoothing=0.0,
    sft_weight=0.0, kl_weight=0.0, kl_on="both", divergence="forward_kl", support="tail", js_mix=0.5,
    kd_temperature=1.0, bias=None, logit_scale=1.0, softcap=None, temperature=1.0,
):  # fmt: skip
    """The loss in Python loops over answers and tokens, from float64 logits and their softmax."""
    logits = hidden.double() @ weight.double().T
    logits = (logits if bias is None else logits + bias.double()) * logit_scale
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    probs = (logits / temperature).softmax(-1)
    pairs = len(labels) // 2

    def tokens_of(row):
        return [t for t in range(labels.shape[1]) if labels[row, t] != -100]

    def logp(row):
        return sum((probs[row, t, labels[row, t]].log() for t in tokens_of(row)), torch.zeros((), dtype=F64))

    def reward(row):
        by_ref = beta_ref * (logp(row) - ref_logps[row])
        return by_ref + beta_teacher * (logp(row) - sum(teacher.label_logps[row, t] for t in tokens_of(row)))

    def token_divergence(row, t):
        ids = teacher.topk_ids[row, t].tolist()
        others = [j for j in range(len(weight)) if j not in ids]
        q, p = probs[row, t][ids], teacher.topk_logps[row, t].double().exp()
        if support == "tail":
            q = torch.cat([q, probs[row, t][others].sum()[None]])
            p = torch.cat([p, teacher.topk_tail[row, t].double().exp()[None]])
        if support == "renormalized":
            q, p = q ** (1 / kd_temperature), p ** (1 / kd_temperature)
            q, p = q / q.sum(), p / p.sum()
        m = js_mix * p + (1 - js_mix) * q
        return {
            "forward_kl": (p * (p / q).log()).sum(),
            "reverse_kl": (q * (q / p).log()).sum(),
            "js": js_mix * (p * (p / m).log()).sum() + (1 - js_mix) * (q * (q / m).log()).sum(),
        }[divergence]

    def pair_loss(i):
        chosen, rejected = reward(i), reward(pairs + i)
        if loss_type in ("ipo", "sigmoid_norm"):
            chosen, rejected = chosen / len(tokens_of(i)), rejected / len(tokens_of(pairs + i))
        margin, e = chosen - rejected, label_smoothing
        good, bad = -torch.sigmoid(margin).log(), -torch.sigmoid(-margin).log()
        return {
            "sigmoid": (1 - e) * good + e * bad,
            "sigmoid_norm": (1 - e) * good + e * bad,
            "robust": ((1 - e) * good - e * bad) / (1 - 2 * e),
            "hinge": (1 - margin).clamp(min=0),
            "ipo": (margin / (beta_ref + beta_teacher) - 1 / (2 * (beta_ref + beta_teacher))) ** 2,
        }[loss_type]

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    loss = probs.sum() * 0
    if beta_ref or beta_teacher:
        loss = loss + mean([pair_loss(i) for i in range(pairs) if tokens_of(i) and tokens_of(pairs + i)])
    if kl_weight:
        rows = {"both": range(2 * pairs), "chosen": range(pairs), "rejected": range(pairs, 2 * pairs)}[kl_on]
        loss = loss + kl_weight * mean([token_divergence(row, t) for row in rows for t in tokens_of(row)])
    if sft_weight:
        nll = [-probs[row, t, labels[row, t]].log() for row in range(pairs) for t in tokens_of(row)]
        loss = loss + sft_weight * mean(nll)
    return loss


def value_and_grads(function, batch, **options):
    leaves = [batch[name].clone().requires_grad_() for name in ("hidden", "weight")]
    rest = {name: batch[name] for name in ("labels", "ref_logps", "teacher")}
    out = function(*leaves, **rest, **options)
    loss = getattr(out, "loss", out)
    return out, loss.detach(), torch.autograd.grad(loss, leaves)


def assert_matches_dense(batch, **options):
    """To the precision of what the primitive returns; sums of up to some hundred terms of order 1 to 10."""
    out, loss, grads = value_and_grads(linear_dadpo_loss, batch, **options)
    _, true_loss, true_grads = value_and_grads(dense, batch, **options)
    eps = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.double(), true_loss, rtol=100 * eps, atol=100 * eps)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=300 * eps, atol=100 * eps * true_grad.abs().max().item())
    return out


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_preference_losses(loss_type, label_smoothing):
    if label_smoothing and loss_type in ("hinge", "ipo"):
        with pytest.raises(ValueError, match="has no label smoothing"):
            linear_dadpo_loss(**make(), **BETAS, loss_type=loss_type, label_smoothing=label_smoothing)
        return
    assert_matches_dense(make(), **BETAS, loss_type=loss_type, label_smoothing=label_smoothing, sft_weight=0.3)


@pytest.mark.parametrize("kl_on", ["both", "chosen", "rejected"])
@pytest.mark.parametrize("support", ["tail", "renormalized", "truncated"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_distillation_terms(divergence, support, kl_on):
    kd_temperature = 2.0 if support == "renormalized" else 1.0
    options = {"divergence": divergence, "support": support, "kl_on": kl_on, "kd_temperature": kd_temperature}
    assert_matches_dense(make(1), **BETAS, kl_weight=0.7, js_mix=0.3, **options)


@pytest.mark.parametrize(
    "head",
    [{"bias": torch.linspace(-1, 1, 17, dtype=F64)}, {"logit_scale": 0.5}, {"softcap": 3.0}, {"temperature": 2.0}],
)
def test_options_of_the_head(head):
    assert_matches_dense(make(2), **BETAS, kl_weight=0.5, **head)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_mask(data):
    pairs, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    vocabulary = data.draw(st.integers(2, 20))
    k = data.draw(st.integers(1, vocabulary - 1))
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=2 * pairs, max_size=2 * pairs))
    batch = make(data.draw(st.integers(0, 999)), pairs, tokens, 3, vocabulary, k, lengths)
    loss_type = data.draw(st.sampled_from(["sigmoid", "sigmoid_norm", "ipo"]))
    assert_matches_dense(
        batch, **BETAS, loss_type=loss_type, kl_weight=0.5, kl_on=data.draw(st.sampled_from(["both", "chosen"]))
    )


def test_equals_trl_with_the_mixed_reference():
    batch = make(3, pairs=4)
    valid = batch["labels"] != -100
    teacher_logps = batch["teacher"].label_logps.sum(-1)
    beta = sum(BETAS.values())
    mixed = (BETAS["beta_ref"] * batch["ref_logps"] + BETAS["beta_teacher"] * teacher_logps) / beta
    recorded = {}

    def trl(hidden, weight, labels, **_):
        logps = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * valid
        loss, metrics = trl_dpo(logps, valid, mixed, beta, ["sigmoid", "sft"], [1.0, 0.25])
        recorded.update(metrics)
        return loss

    _, true_loss, true_grads = value_and_grads(trl, batch)
    out, loss, grads = value_and_grads(linear_dadpo_loss, batch, **BETAS, sft_weight=0.25)
    eps = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.double(), true_loss, rtol=100 * eps, atol=0)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=300 * eps, atol=100 * eps * true_grad.abs().max().item())
    # TRL's rewards are measured from the mixed reference, ours from the two models: the same numbers.
    ours = {name: value.item() for name, value in out.metrics.items()}
    assert ours == {name: pytest.approx(recorded[name], rel=1000 * eps) for name in ours}
    assert set(ours) == {name for name in recorded if name.startswith(("rewards/", "logps/"))}


def test_metrics_of_the_distillation():
    batch = make(4)
    out = linear_dadpo_loss(**batch, **BETAS, kl_weight=2.0, kl_on="rejected")
    base = linear_dadpo_loss(**batch, **BETAS)
    valid = (batch["labels"] != -100)[3:]
    teacher = batch["teacher"]
    probs = (batch["hidden"] @ batch["weight"].T).softmax(-1)
    student_mass = probs.gather(-1, teacher.topk_ids).sum(-1)[3:][valid].mean().item()
    assert out.metrics["distill/teacher_mass"].item() == pytest.approx(
        teacher.topk_logps[3:][valid].exp().sum(-1).mean().item(), rel=1e-5
    )
    assert out.metrics["distill/student_mass"].item() == pytest.approx(student_mass, rel=1e-5)
    assert (out.loss - base.loss).item() == pytest.approx(2 * out.metrics["distill/kl"].item(), rel=1e-5)
    assert not any(value.requires_grad or value.dim() for value in out.metrics.values())


@pytest.mark.parametrize("splits", [[1, 1, 1, 1], [1, 3], [4]])
def test_gradients_of_micro_batches_add_up(splits):
    # Uneven lengths, an incomplete pair and an empty one: no mean of means would do.
    batch = make(5, pairs=4, lengths=[5, 1, 0, 0, 2, 4, 3, 0])
    options = {**BETAS, "kl_weight": 0.6, "sft_weight": 0.4}
    whole, loss, grads = value_and_grads(linear_dadpo_loss, batch, **options)
    micro_batches = []
    for pairs in torch.arange(4).split(splits):
        rows = torch.cat([pairs, pairs + 4])
        part = {name: batch[name][rows] for name in ("hidden", "labels", "ref_logps")}
        part["teacher"] = TeacherTargets(*(x[rows] for x in batch["teacher"]))
        micro_batches.append((rows, part | {"weight": batch["weight"]}))
    counts = sum(pair_counts(part["labels"]) for _, part in micro_batches)
    assert counts.tolist() == pair_counts(batch["labels"]).tolist() == [2, 6, 9]

    total, total_hidden, total_weight = 0, torch.zeros_like(batch["hidden"]), torch.zeros_like(batch["weight"])
    metrics = dict.fromkeys(whole.metrics, 0)
    for rows, part in micro_batches:
        out, part_loss, (part_hidden, part_weight) = value_and_grads(linear_dadpo_loss, part, counts=counts, **options)
        total += part_loss
        total_hidden[rows] += part_hidden
        total_weight += part_weight
        metrics = {name: metrics[name] + value for name, value in out.metrics.items()}
    eps = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(total, loss, rtol=30 * eps, atol=0)
    torch.testing.assert_close(total_hidden, grads[0], rtol=100 * eps, atol=10 * eps)
    torch.testing.assert_close(total_weight, grads[1], rtol=100 * eps, atol=30 * eps)
    torch.testing.assert_close(metrics, whole.metrics, rtol=100 * eps, atol=10 * eps)


def test_counts_divided_by_ranks_make_the_average_over_ranks_exact():
    batch = make(6)
    counts = pair_counts(batch["labels"])
    one = linear_dadpo_loss(**batch, **BETAS, kl_weight=0.5).loss
    scaled = linear_dadpo_loss(**batch, **BETAS, kl_weight=0.5, counts=counts / 16).loss
    torch.testing.assert_close(scaled / 16, one)


def test_what_stands_at_masked_positions_is_not_read():
    batch = make(7, lengths=[5, 2, 3, 4, 1, 2])
    options = {**BETAS, "kl_weight": 0.5}
    clean = value_and_grads(linear_dadpo_loss, batch, **options)
    masked = batch["labels"] == -100
    poison = dict(batch)
    poison["teacher"] = TeacherTargets(
        *(x.clone().masked_fill_(masked.reshape(*masked.shape, *[1] * (x.dim() - 2)), value)
          for x, value in zip(batch["teacher"], (torch.nan, 10**6, torch.nan, torch.inf), strict=True))
    )  # fmt: skip
    dirty = value_and_grads(linear_dadpo_loss, poison, **options)
    torch.testing.assert_close(dirty[1:], clean[1:], rtol=0, atol=0)
    torch.testing.assert_close(dirty[0].metrics, clean[0].metrics, rtol=0, atol=0)


def test_no_tokens_at_all_is_zero():
    batch = make(8, lengths=[0] * 6)
    out, loss, grads = value_and_grads(linear_dadpo_loss, batch, **BETAS, kl_weight=1, sft_weight=1)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)
    assert all(value == 0 for value in out.metrics.values())


def test_a_pair_with_an_empty_answer_has_no_preference_term():
    batch = make(9, pairs=2, lengths=[3, 0, 2, 5])
    only = {name: value[[0, 2]] for name, value in batch.items() if name not in ("weight", "teacher")}
    only["teacher"] = TeacherTargets(*(x[[0, 2]] for x in batch["teacher"]))
    for loss_type in ("sigmoid", "sigmoid_norm", "ipo"):
        both = value_and_grads(linear_dadpo_loss, batch, **BETAS, loss_type=loss_type)
        alone = linear_dadpo_loss(**only, weight=batch["weight"], **BETAS, loss_type=loss_type)
        torch.testing.assert_close(both[1], alone.loss.detach())
        assert (both[2][0][3] == 0).all()
        assert all(grad.isfinite().all() for grad in both[2])
    assert linear_dadpo_loss(**batch, **BETAS, kl_weight=1.0).metrics["distill/kl"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_hidden_states(dtype):
    batch = make(10)
    low = batch | {name: batch[name].to(dtype) for name in ("hidden", "weight")}
    low |= {"ref_logps": batch["ref_logps"].float(), "teacher": TeacherTargets(
        *(x.float() if x.is_floating_point() else x.int() for x in batch["teacher"])
    )}  # fmt: skip
    _, loss, grads = value_and_grads(linear_dadpo_loss, low, **BETAS, kl_weight=0.5)
    _, true_loss, true_grads = value_and_grads(dense, low, **BETAS, kl_weight=0.5)
    assert loss.dtype == torch.float32
    assert grads[0].dtype == dtype
    torch.testing.assert_close(loss.double(), true_loss.double(), rtol=1e-5, atol=0)
    eps = torch.finfo(dtype).eps
    for grad, true_grad in zip(grads, true_grads, strict=True):
        largest = true_grad.abs().max().item()
        torch.testing.assert_close(grad.double(), true_grad.double(), rtol=8 * eps, atol=8 * eps * largest)


def test_one_call_of_the_primitive_and_no_topk_unless_asked(monkeypatch):
    calls = []
    primitive = linear_loss.selected_logps_of

    def spy(hidden, head, labels, topk_ids, ignore_index, run):
        calls.append((topk_ids, run.backend, run.memory_budget))
        return primitive(hidden, head, labels, topk_ids, ignore_index, run)

    monkeypatch.setattr(linear_loss, "selected_logps_of", spy)
    batch = make()
    linear_dadpo_loss(**batch, **BETAS, sft_weight=1.0, backend="reference", memory_budget=0)
    assert calls == [(None, "reference", 0)]
    out = linear_dadpo_loss(**batch, **BETAS, kl_weight=1.0)
    assert calls[1][0] is batch["teacher"].topk_ids
    assert len(calls) == 2
    assert {"distill/kl", "distill/teacher_mass", "distill/student_mass"} <= set(out.metrics)


def test_only_what_has_a_weight_is_needed_and_reported():
    batch = make()
    core = {name: batch[name] for name in ("hidden", "weight", "labels")}
    dpo = linear_dadpo_loss(**core, ref_logps=batch["ref_logps"], beta_ref=0.5, beta_teacher=0)
    assert "rewards/chosen" in dpo.metrics
    assert "distill/kl" not in dpo.metrics
    distill = linear_dadpo_loss(**core, teacher=batch["teacher"], beta_ref=0, beta_teacher=0, kl_weight=1)
    assert set(distill.metrics) == {
        "logps/chosen", "logps/rejected", "distill/kl", "distill/teacher_mass", "distill/student_mass"
    }  # fmt: skip
    torch.testing.assert_close(distill.loss.detach(), distill.metrics["distill/kl"])
    sft = linear_dadpo_loss(**core, beta_ref=0, beta_teacher=0, sft_weight=1)
    assert set(sft.metrics) == {"logps/chosen", "logps/rejected"}
    assert sft.loss > 0.5


def broken(change):
    batch = make(lengths=[5] * 6)
    change(batch)
    return batch


def replace(batch, field, index, value):
    tensor = getattr(batch["teacher"], field).clone()
    tensor[index] = value
    batch["teacher"] = batch["teacher"]._replace(**{field: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(labels=b["labels"][:5]), r"labels has shape \[5, 5\]: \[2B, T\] is needed"),
        (lambda b: b.update(labels=b["labels"][0]), r"labels has shape \[5\]"),
        (lambda b: b.update(hidden=b["hidden"][:, :4]), r"hidden has shape \[6, 4, 6\] and labels \[6, 5\]"),
        (lambda b: b.update(ref_logps=None), "beta_ref > 0 needs ref_logps"),
        (lambda b: b.update(ref_logps=b["ref_logps"][:3]), r"ref_logps has shape \[3\]"),
        (lambda b: b["ref_logps"].__setitem__(2, torch.nan), r"ref_logps\[2\] is nan: a finite log-probability"),
        (lambda b: b["ref_logps"].__setitem__(2, -torch.inf), r"ref_logps\[2\] is -inf"),
        (lambda b: b.update(teacher=None), "beta_teacher > 0 needs teacher"),
        (lambda b: replace(b, "label_logps", (1, 3), torch.nan), r"teacher.label_logps\[1, 3\] is nan"),
        (lambda b: replace(b, "label_logps", (1, 3), -torch.inf), r"teacher.label_logps\[1, 3\] is -inf: a finite"),
        (lambda b: replace(b, "topk_logps", (1, 3, 2), torch.nan), r"teacher.topk_logps\[1, 3, 2\] is nan"),
        (lambda b: replace(b, "topk_logps", (1, 3, 2), 0.5), r"teacher.topk_logps\[1, 3, 2\] is 0.5"),
        (lambda b: replace(b, "topk_tail", (0, 0), torch.nan), r"teacher.topk_tail\[0, 0\] is nan"),
        (
            lambda b: replace(b, "topk_ids", (5, 4, 3), 17),
            r"topk_ids\[29, 3\] is 17: outside the head's vocabulary",  # of all tokens, flattened
        ),
        (lambda b: replace(b, "topk_ids", (5, 4, 3), -1), r"topk_ids\[29, 3\] is -1"),
        (
            lambda b: b.update(teacher=TeacherTargets(*(x[:, 1:] for x in b["teacher"]))),
            r"teacher.label_logps has shape \[6, 4\], \[6, 5\] is needed",
        ),
        (
            lambda b: b.update(teacher=b["teacher"]._replace(topk_ids=b["teacher"].topk_ids[..., 1:])),
            r"teacher.topk_ids has shape \[6, 5, 3\], \[6, 5, 4\] is needed",
        ),
        (lambda b: b.update(counts=torch.tensor(3)), r"counts has shape \[\]: pass a sum of pair_counts"),
    ],
)
def test_bad_tensors(change, message):
    with pytest.raises(ValueError, match=message):
        linear_dadpo_loss(**broken(change), **BETAS, kl_weight=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_ref": -1}, "beta_ref must be finite and not negative, got -1"),
        ({"loss_type": "dpo"}, "unknown loss_type 'dpo': choose one of sigmoid"),
        ({"kl_weight": -1}, "kl_weight must be finite and not negative, got -1"),
        ({"sft_weight": math.nan}, "sft_weight must be finite and not negative, got nan"),
        ({"kl_on": "all"}, "unknown kl_on 'all': choose one of both, chosen, rejected"),
        ({"divergence": "kl"}, "unknown divergence 'kl'"),
        ({"beta_ref": 0, "beta_teacher": 0}, "leaves no loss"),
        ({"kd_temperature": 2.0}, "needs support='renormalized'"),
    ],
)
def test_bad_options_are_refused_by_function_and_module(options, message):
    with pytest.raises(ValueError, match=message):
        LinearDaDPOLoss(**(BETAS | options))
    with pytest.raises(ValueError, match=message):
        linear_dadpo_loss(**make(), **(BETAS | options))


def test_half_precision_reference_sums_are_refused():
    batch = make()
    with pytest.raises(TypeError, match=r"ref_logps is torch\.float16"):
        linear_dadpo_loss(**(batch | {"ref_logps": batch["ref_logps"].half()}), **BETAS)


def test_module_is_the_function_with_its_options():
    batch = make(11)
    options = {
        **BETAS, "loss_type": "robust", "label_smoothing": 0.1, "sft_weight": 0.2, "kl_weight": 0.3, "kl_on": "chosen",
        "divergence": "js", "support": "renormalized", "js_mix": 0.2, "kd_temperature": 3.0,
        "ignore_index": 3, "backend": "reference", "memory_budget": 0, "grad_tolerance": 0.01,
    }  # fmt: skip
    batch["labels"][batch["labels"] == -100] = 3
    bias = torch.linspace(-1, 1, 17, dtype=F64)
    head = {"bias": bias, "logit_scale": 0.9, "softcap": 4.0, "temperature": 1.5}
    module = LinearDaDPOLoss(**options)
    counts = torch.tensor([4, 11, 12])
    expected = linear_dadpo_loss(**batch, **head, counts=counts, **options)
    torch.testing.assert_close(module(**batch, **head, counts=counts), expected, rtol=0, atol=0)
    whole = batch | {"weight": Head(batch["weight"], **head)}
    torch.testing.assert_close(module(**whole, counts=counts), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="softcap given in addition to a Head"):
        module(**whole, softcap=4.0)
    assert module.options == options
    assert repr(module).startswith("LinearDaDPOLoss(beta_ref=0.3, beta_teacher=0.2, loss_type='robust'")
    assert not module.state_dict()


def test_compiles_without_graph_breaks():
    batch = make(12)
    module = LinearDaDPOLoss(**BETAS, kl_weight=0.5, sft_weight=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, actual = (value_and_grads(function, batch) for function in (module, compiled))
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-12, atol=1e-14)
    replace(batch, "topk_ids", (0, 0, 0), 17)
    with pytest.raises(ValueError, match=r"topk_ids\[0, 0\] is 17: outside"):
        compiled(**batch)


def test_import_is_light():
    code = (
        "import sys, dadpo_kernels; assert 'torch' not in sys.modules; dadpo_kernels.linear_dadpo_loss; "
        "print(sorted({'transformers', 'triton', 'pyarrow', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
