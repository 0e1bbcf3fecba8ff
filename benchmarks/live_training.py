"""Is the live plan safe to train with? Twin runs, exact and live, from the same seeds.

    python -m benchmarks.live_training --out benchmarks/results/live_training.json

Two tasks on a tokenizer of 4,096 entries and the quickstart's own text:

- `cross_entropy`: a two-layer Llama (5 million parameters, most of them in its two vocabulary matrices) from a random
  initialisation, plain cross-entropy on every token. Early on its softmax is nearly uniform, later it is not.
- `distill`: the quickstart's job scaled down. The teacher is such a model after `cross_entropy`; the student is the
  teacher without its last layer; `DaDPOTrainer` with preference term, KL and SFT on the quickstart's pairs.

The plans take the same batches in the same order, so their difference is the plan's alone; the spread over seeds tells
how much a difference would mean. Everything that is evaluated is evaluated exactly.

The file: `{task: {metric: {plan: [one value per seed]}, "curves": {plan: [[training loss per step] per seed]},
"live": {plan: [means of the diagnostics per seed]}}}`, and `environment`; the plans are `exact` and `live TOLERANCE`.
"""

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.process import environment
from dadpo_kernels import linear_selected_logps, live_diagnostics
from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trainer import DaDPOTrainer
from examples.quickstart.prune import DATA, drop_layers

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
    curve: list[float] = []
    with live_diagnostics() as done:
        for _ in range(steps):
            rows = train[torch.randint(len(train), (BATCH,), generator=order)]
            loss = nll(model, rows, tolerance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            curve.append(loss.item())
    with torch.no_grad():
        final = nll(model, heldout).item()
    means = {key: statistics.mean(getattr(d, key) for d in done) for key in LIVE} if done else {}
    return model, {"curve": curve, "live": means, "heldout_nll": final}


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
    return {"curve": [e["loss"] for e in history], "live": live, **{k: final[v] for k, v in scores.items()}}


def student_of(teacher: Any) -> Any:
    return drop_layers(copy.deepcopy(teacher), [teacher.config.num_hidden_layers - 1])


def collect(task: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One value per seed for every plan and metric; prints the means and the seeds' standard deviation."""
    metrics = [key for key in runs["exact"][0] if key not in ("curve", "live")]
    result: dict[str, Any] = {key: {plan: [r[key] for r in seeds] for plan, seeds in runs.items()} for key in metrics}
    for key in metrics:
        for plan, values in result[key].items():
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{task:14} {key:17} {plan:11} {statistics.mean(values):.4f} +- {deviation:.4f}", flush=True)
    result["curves"] = {plan: [r["curve"] for r in seeds] for plan, seeds in runs.items()}
    result["live"] = {plan: [r["live"] for r in seeds] for plan, seeds in runs.items() if plan != "exact"}
    return result


def rounded(value: Any) -> Any:
    """Five digits: the file is committed."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.5g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="of cross_entropy")
    parser.add_argument("--epochs", type=int, default=1, help="of distill")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

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
    results = {"cross_entropy": collect("cross_entropy", runs)}

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
    results["distill"] = collect("distill", runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    measured = {"environment": environment(torch.get_num_threads())} | rounded(results)
    args.out.write_text(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
