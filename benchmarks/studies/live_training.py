"""Is the live plan safe to train with? Twin runs, exact and live, from the same seeds.

    python -m benchmarks.studies.live_training --out benchmarks/results/live_training.json

Two tasks on a tokenizer of 4,096 entries and the quickstart's own text:

- `cross_entropy`: a two-layer Llama (5 million parameters, most of them in its two vocabulary matrices) from a random
  initialisation, plain cross-entropy on every token. Early on its softmax is nearly uniform, later it is not.
- `distill`: the quickstart's job scaled down. The teacher is such a model after `cross_entropy`; the student is the
  teacher without its last layer; `DaDPOTrainer` with preference term, KL and SFT on the quickstart's pairs.

The plans take the same batches in the same order, so their difference is the plan's alone; the spread over seeds tells
how much a difference would mean. Everything that is evaluated is evaluated exactly.

A variant is the task and the plan, `exact` or `live TOLERANCE`; a value has one for each seed, `loss` each step of it.
"""

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.process import arguments, environment
from benchmarks.rows import NOTHING, Rows, caption, markdown, measured, save
from dadpo_kernels import linear_selected_logps, live_diagnostics
from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trainer import DaDPOTrainer
from examples.quickstart.prune import DATA, drop_layers

STUDY = "live_training"
VOCAB, LENGTH, BATCH = 4096, 128, 8
TOLERANCES = (None, 1e-3, 1e-2)
LIVE = ("certificate", "live_share", "exact_share", "units")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def name(tolerance: float | None) -> str:
    return "exact" if tolerance is None else f"live {tolerance:g}"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>", "<|eos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|eos|>", chat_template=TEMPLATE)


def make_model(vocab: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def answers(split: str) -> list[str]:
    records = read_pairs(DATA / f"{split}.jsonl")
    return [r["prompt"][0]["content"] + "\n" + r["chosen"][0]["content"] for r in records]


def nll(model: Any, rows: Tensor, tolerance: float | None = None) -> Tensor:
    """Mean negative log-likelihood of `rows [B, T + 1]`."""
    hidden = model.model(rows[:, :-1]).last_hidden_state
    return -linear_selected_logps(hidden, model.lm_head.weight, rows[:, 1:], grad_tolerance=tolerance).label.mean()


def cross_entropy(
    vocab: int, train: Tensor, heldout: Tensor, seed: int, steps: int, tolerance: float | None
) -> tuple[Any, dict[str, Any]]:
    model = make_model(vocab, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with live_diagnostics() as done:
        for _ in range(steps):
            rows = train[torch.randint(len(train), (BATCH,), generator=order)]
            loss = nll(model, rows, tolerance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    with torch.no_grad():
        final = nll(model, heldout).item()
    means = {key: statistics.mean(getattr(d, key) for d in done) for key in LIVE} if done else {}
    return model, {"loss": losses, "heldout_nll": final, **means}


def distill(teacher: Any, tokenizer: Any, caches: dict[str, Path], seed: int, epochs: int, tolerance: float | None):
    with tempfile.TemporaryDirectory() as out:
        config = DaDPOConfig(
            output_dir=out, beta_ref=0.01, beta_teacher=0.02, kl_weight=5.0, sft_weight=2.0, learning_rate=1e-3,
            num_train_epochs=epochs, per_device_train_batch_size=8, warmup_steps=6, weight_decay=0.0, seed=seed,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            grad_tolerance=tolerance,
        )  # fmt: skip
        trainer = DaDPOTrainer(student_of(teacher), config, *(PairDataset(c) for c in caches.values()), tokenizer)
        trainer.train()
        final = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    live = {key: statistics.mean(e[f"live/{key}"] for e in history) for key in LIVE} if tolerance else {}
    scores = {"heldout_kl": "eval_distill/kl", "heldout_accuracy": "eval_rewards/accuracies"}
    return {"loss": [e["loss"] for e in history], **{k: final[v] for k, v in scores.items()}, **live}


def student_of(teacher: Any) -> Any:
    return drop_layers(copy.deepcopy(teacher), [teacher.config.num_hidden_layers - 1])


def collect(task: str, runs: dict[str, list[dict[str, Any]]], machine: dict) -> Rows:
    """Of all plans, from what their seeds gave."""
    rows = Rows()
    for plan, seeds in runs.items():
        metrics = {key: rounded([seed[key] for seed in seeds]) for key in seeds[0]}
        rows += measured(STUDY, machine, metrics, task=task, plan=plan)
        print(task, plan, {key: values for key, values in metrics.items() if key != "loss"}, flush=True)
    return rows


def rounded(value: Any) -> Any:
    """Five digits: the file is committed."""
    return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.5g}")


METRICS = {
    "heldout_nll": "held-out negative log-likelihood",
    "heldout_kl": "held-out KL to the teacher",
    "heldout_accuracy": "held-out preference accuracy",
    "live_share": "live share of the columns",
    "units": "matrix products",
}


def live_training(rows: Rows) -> str:
    """A table for each task: the mean and the seeds' standard deviation, or the mean of a plan's diagnostics."""
    parts = []
    for task in rows.where(STUDY).groups("task"):
        plans = task.groups("plan")
        lines = []
        for metric, title in METRICS.items():
            cells = [cell(plan.get(metric), spread=metric.startswith("heldout")) for plan in plans]
            if set(cells) != {NOTHING}:
                lines.append([title, *cells])
        losses = plans[0].get("loss")
        title = f"{task[0].variant['task'].replace('_', ' ')}, {len(losses[0])} steps, {len(losses)} seeds"
        parts.append(markdown([title, *(plan[0].variant["plan"] for plan in plans)], lines))
    source = caption(rows.where(STUDY), "studies.live_training --out benchmarks/results/live_training.json")
    return "\n\n".join([*parts, source])


def cell(seeds: list[float] | None, spread: bool) -> str:
    if seeds is None:
        return NOTHING
    mean = statistics.mean(seeds)
    return f"{mean:.4f} ± {statistics.stdev(seeds):.4f}" if spread else f"{mean:.2f}"


TABLES = {"live-training": live_training}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="of cross_entropy")
    parser.add_argument("--epochs", type=int, default=1, help="of distill")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    texts = answers("train")
    tokenizer = make_tokenizer(texts)
    ids = [torch.tensor(tokenizer("\n\n".join(part))["input_ids"]) for part in (texts, answers("heldout"))]
    train, heldout = (i[: len(i) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1) for i in ids)

    runs: dict[str, list[dict[str, Any]]] = {name(t): [] for t in TOLERANCES}
    teacher = None
    for seed in range(args.seeds):
        for tolerance in TOLERANCES:
            model, run = cross_entropy(len(tokenizer), train, heldout, seed, args.steps, tolerance)
            runs[name(tolerance)].append(run)
            teacher = teacher or model
    machine = environment(args.threads)
    rows = collect("cross_entropy", runs, machine)

    runs = {name(t): [] for t in TOLERANCES}
    with tempfile.TemporaryDirectory() as directory:
        caches = {split: Path(directory) / split for split in ("train", "heldout")}
        for split, cache in caches.items():
            pairs = tokenize_pairs(read_pairs(DATA / f"{split}.jsonl"), tokenizer, 192)
            capture_teacher(teacher, tokenizer, pairs, cache, k=8)
            capture_reference(student_of(teacher), tokenizer, cache)
        for seed in range(args.seeds):
            for tolerance in TOLERANCES:
                runs[name(tolerance)].append(distill(teacher, tokenizer, caches, seed, args.epochs, tolerance))
    save(args.out, rows + collect("distill", runs, machine))


if __name__ == "__main__":
    main()
