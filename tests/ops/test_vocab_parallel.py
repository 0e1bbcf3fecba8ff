"""The primitive on a sharded head: 2 and 4 processes against one, value and gradient, and what they exchange."""

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from dadpo_kernels import linear_dadpo_loss, linear_selected_logps, linear_topk_logps
from dadpo_kernels.losses.targets import TeacherTargets
from dadpo_kernels.ops.vocab_parallel import vocab_parallel_selected_logps
from tests.ops.contract import OPTIONS, PROBLEMS, Subject, confident
from tests.support.dense import IGNORE, Problem, Standard, finite, random_problem, values_and_grads
from tests.support.ranks import Traffic, run_ranks

WORLDS = [2, 4]
BACKENDS = [("torch", torch.float64), ("torch", torch.bfloat16), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
NEEDS = [(("weight", False),), (("weight", False), ("hidden", False)), (("hidden", False),)]
BUDGETS = {"recompute": 0, "partial": 60_000, "retain": 2**31}


def problems() -> dict[str, Problem]:
    # A whole shard of forbidden tokens, some among the ids and as a label; a shard's logits far from the others'.
    subject = Subject("torch", vocab=1300, tile=467)
    shared = ("-inf", "every logit +300", "second tile -200", "second tile +200", "top k covers vocabulary", "no ids")
    tables = {
        "plain": random_problem(vocab=1300),
        "no topk": random_problem(k=None),
        "all options": random_problem(vocab=1301, **OPTIONS["all"]),
        "one token": random_problem(rows=1, k=3),
        "no valid token": random_problem(),
        "no token": random_problem(rows=0),
        "confident": confident(subject),
        **{name: PROBLEMS[name](subject) for name in shared},
    }
    tables["no valid token"].labels[:] = IGNORE
    return tables


def sizes(vocab: int, world: int) -> list[int]:
    """Uneven on purpose, down to one row."""
    cuts = [vocab // 3] if world == 2 else [1, vocab // 3, vocab // 3 * 2 + 1]
    return [b - a for a, b in zip([0, *cuts], [*cuts, vocab], strict=True)]


def sharded(p: Problem, backend: str, budget: int | None, needs: dict[str, bool] | None = None) -> dict:
    """`values_and_grads` of this rank's shard."""
    group, rank = dist.group.WORLD, dist.get_rank()
    split = sizes(len(p.weight), dist.get_world_size())
    leaves = {"hidden": p.hidden.clone(), "weight": p.weight.split(split)[rank].clone()}
    if p.bias is not None:
        leaves["bias"] = p.bias.split(split)[rank].clone()
    for name, leaf in leaves.items():
        leaf.requires_grad_((needs or {}).get(name, True))
    out = vocab_parallel_selected_logps(
        leaves["hidden"], leaves["weight"], p.labels, p.topk_ids, bias=leaves.get("bias"), group=group,
        backend=backend, memory_budget=budget, **p.options,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(o.shape, generator=g, dtype=torch.float64) * finite(o).double()).sum() for o in out)
    if loss.requires_grad:
        loss.backward()
    return {
        **{k: v.detach() for k, v in out._asdict().items()},
        **{f"grad_{k}": v.grad for k, v in leaves.items()},
    }


def traffic(rows: int, vocab: int, width: int, k: int) -> dict:
    p = random_problem(rows, vocab, width, k).to(torch.bfloat16)  # sums of the ranks are float32 all the same
    with Traffic() as counted:
        sharded(p, "torch", 0)
    return {"bytes": counted.bytes(), "largest": counted.largest, "valid": int((p.labels != IGNORE).sum())}


def dtensor() -> dict:
    """Weight and bias as DTensors, which split 1001 rows unevenly; the gradients are DTensors."""
    p = random_problem(vocab=1001, bias=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (p.weight, p.bias))
    with Traffic() as counted:
        out = vocab_parallel_selected_logps(
            p.hidden, weight, p.labels, p.topk_ids, bias=bias, group=mesh.get_group(), **p.options
        )
        out.label.sum().backward()
    assert counted.bytes().keys() == {"allreduce_", "allgather_"}  # of counts and sums; a whole head has another name
    assert isinstance(weight.grad, DTensor)
    assert len(weight.grad.to_local()) < len(p.weight)
    return {"label": out.label.detach(), "weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}


def pair_loss(group: dist.ProcessGroup | None) -> dict:
    """The whole loss on this rank's shard, or on the whole head."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, 24, generator=g, requires_grad=True)
    weight = torch.randn(301, 24, generator=g)
    labels = torch.randint(301, (4, 9), generator=g)
    labels[:, :2], labels[1] = IGNORE, IGNORE
    known = linear_topk_logps(torch.randn(4, 9, 24, generator=g), weight, 6, labels=labels.clamp(min=0))
    if group is not None:
        weight = weight.split(sizes(301, group.size()))[group.rank()].clone()
    weight.requires_grad_()
    out = linear_dadpo_loss(
        hidden, weight, labels, ref_logps=torch.full((4,), -30.0),
        teacher=TeacherTargets(known.label, known.ids, known.logps, known.tail),
        beta_ref=0.1, beta_teacher=0.2, kl_weight=1.0, sft_weight=0.3, vocab_group=group,
    )  # fmt: skip
    out.loss.backward()
    return {"loss": out.loss.detach(), "hidden": hidden.grad, "weight": weight.grad, **out.metrics}


def autocast() -> bool:
    """Whether autocast, in forward and backward, is the cast of the operands and no more."""
    p = random_problem(bias=True)
    for low in (torch.bfloat16, torch.float16):
        want = sharded(p.to(low), "torch", BUDGETS["retain"])
        with torch.autocast("cpu", low):
            got = sharded(p, "torch", BUDGETS["retain"])
        if not all(torch.equal(got[name].float(), value.float()) for name, value in want.items()):
            return False
    return bool(want["label"].abs().max() > 0)


def forward_mode() -> str:
    p = random_problem()
    share = p.weight.split(sizes(len(p.weight), dist.get_world_size()))[dist.get_rank()]
    try:
        with forward_ad.dual_level():
            hidden = forward_ad.make_dual(p.hidden, p.hidden)
            vocab_parallel_selected_logps(hidden, share, p.labels, group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def errors() -> dict:
    p, rank, group = random_problem(), dist.get_rank(), dist.group.WORLD
    share = p.weight.split(sizes(len(p.weight), group.size()))[rank]
    mesh = init_device_mesh("cpu", (group.size(),))

    def message(weight=share, labels=p.labels, topk_ids=p.topk_ids, **options) -> str:
        try:
            vocab_parallel_selected_logps(p.hidden, weight, labels, topk_ids, group=group, **options)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    return {
        "batch": message(labels=p.labels + rank),
        "k": message(topk_ids=p.topk_ids[:, : 1 + rank % 2]),
        "empty": message(weight=share[: 0 if rank else None]),
        "columns": message(weight=distribute_tensor(p.weight, mesh, [Shard(1)])),
        "range": message(labels=p.labels.where(p.labels == IGNORE, len(p.weight))),
        "reference": message(backend="reference"),
    }


def worker() -> dict:
    """All that a rank does in this file; processes take seconds to start."""
    return {
        "numbers": {
            (name, backend, dtype, plan): sharded(p.to(dtype), backend, budget)
            for name, p in problems().items()
            for backend, dtype in BACKENDS
            for plan, budget in BUDGETS.items()
        },
        "frozen": {needs: sharded(random_problem(), "cpu", 2**31, dict(needs)) for needs in NEEDS},
        "traffic": {size: traffic(*size) for size in [(30, 1000, 64, 5), (30, 3000, 64, 5), (60, 1000, 64, 9)]},
        "dtensor": dtensor(),
        "loss": pair_loss(dist.group.WORLD),
        "errors": errors(),
        "autocast": autocast(),
        "forward mode": forward_mode(),
    }


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request):
    return run_ranks(request.param, worker)


@pytest.mark.parametrize("name", problems())
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_equals_one_process(ranks, name, backend, dtype):
    """The whole head's float64 values and gradients, by the policy of dense.py; ranks agree to the last bit."""
    standard = Standard.of(problems()[name], dtype)
    for plan in BUDGETS:
        shards = [values["numbers"][name, backend, dtype, plan] for values in ranks]
        got = dict(shards[0])
        for key in got:
            if key in ("grad_weight", "grad_bias"):
                got[key] = torch.cat([shard[key] for shard in shards])
            else:
                assert all(torch.equal(shard[key], got[key]) for shard in shards), f"{key}: ranks differ"
        standard.check(got, f"{plan}, ", roundings=1)


def test_frozen_and_no_grad(ranks):
    """What is not asked for is not made; the rest does not change."""
    want = values_and_grads(random_problem(), "cpu")
    split = sizes(1000, len(ranks))
    for needs in NEEDS:
        for rank, values in enumerate(ranks):
            got = values["frozen"][needs]
            for name in ("hidden", "weight"):
                if (name, False) in needs:
                    assert got[f"grad_{name}"] is None
            torch.testing.assert_close(got["tail"], want["tail"], rtol=1e-5, atol=1e-5)
            if got["grad_hidden"] is not None:
                torch.testing.assert_close(got["grad_hidden"], want["grad_hidden"], rtol=1e-4, atol=1e-5)
            if got["grad_weight"] is not None:
                torch.testing.assert_close(
                    got["grad_weight"], want["grad_weight"].split(split)[rank], rtol=1e-4, atol=1e-5
                )


def test_communication_is_counted(ranks):
    """Exactly what the docstring says, to the byte: nothing grows with the vocabulary, and no rank ever holds it."""
    for (rows, vocab, width, k), first in ranks[0]["traffic"].items():
        n = first["valid"]
        assert 0 < n < rows
        for values in ranks:
            seen = values["traffic"][rows, vocab, width, k]
            assert seen["bytes"]["allreduce_"] == 4 * n * (k + 2) + 8 * n + 4 * n * width
            assert seen["bytes"].keys() == {"allreduce_", "allgather_"}
            assert seen["bytes"]["allgather_"] == 8 * 5 * (len(ranks) + 1)
            assert seen["largest"] < vocab * width


def test_dtensor(ranks):
    p = random_problem(vocab=1001, bias=True)
    weight, bias = p.weight.requires_grad_(), p.bias.requires_grad_()
    want = linear_selected_logps(p.hidden, weight, p.labels, p.topk_ids, bias=bias)
    want.label.sum().backward()
    for values in ranks:
        got = values["dtensor"]
        torch.testing.assert_close(got["label"], want.label.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["weight"], weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got["bias"], bias.grad, rtol=1e-4, atol=1e-5)


def test_whole_loss(ranks):
    want = pair_loss(None)
    for rank, values in enumerate(ranks):
        got = values["loss"]
        for name, value in want.items():
            part = value.split(sizes(301, len(ranks)))[rank] if name == "weight" else value
            torch.testing.assert_close(got[name], part, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_mistakes_are_refused_on_every_rank(ranks):
    for values in ranks:
        said = values["errors"]
        assert "same batch" in said["batch"]
        assert "differ in their k" in said["k"]
        assert "needs at least one" in said["empty"]
        assert "Shard(0)" in said["columns"]
        assert "outside the head's vocabulary [0, 1000)" in said["range"]
        assert "dense" in said["reference"]


def test_autocast_is_a_cast(ranks):
    assert all(values["autocast"] for values in ranks)


def test_forward_mode_is_refused(ranks):
    assert all("differentiable in reverse mode only" in values["forward mode"] for values in ranks)


def test_sharded_weight_needs_the_call_for_it():
    class Sharded(torch.nn.Parameter):
        full_tensor = None

    p = random_problem()
    with pytest.raises(TypeError, match=r"weight is a DTensor.*full_tensor"):
        linear_selected_logps(p.hidden, Sharded(p.weight), p.labels)
