"""What a teacher's capture costs, what its cache loses, and what reading it costs a training step, on SmolLM2-135M.

    python -m benchmarks.capture head --dtype float32 --out benchmarks/results/capture.json
    python -m benchmarks.capture cache --out benchmarks/results/capture.json
    python -m benchmarks.capture reader --out benchmarks/results/capture.json

Each part replaces its section of the file (times in seconds, memory in MiB, k = 64, and `environment` beside them):

    head/DTYPE [{tokens, gemm, ours, dense: seconds (medians), ours_mib, dense_mib}]. gemm: the product that makes
            the logits, into memory that exists, in its fastest arrangement (`benchmarks.floor`). ours:
            `linear_topk_logps` with labels. dense: `log_softmax(logits).topk(k)`, and the label's gathered. Memory:
            growth of the resident set
    cache   {tokens, bytes_per_token, tokens_per_second, kl_exact, kl_cached, kl_error_mean, kl_error_max}: a cache of
            real pairs, and forward KL to a student (the same model without its last five layers) over top-k and tail,
            from the teacher's float64 values and from the cache's; nats a token
    reader  {pairs, tokens, workers, step_loaded, step_in_memory, wait, read, wait_share, read_share}: medians a step
            of `DaDPOTrainer` on so many pairs with so many answer tokens (mean). step_loaded: from one step's start
            to the next, batches from the cache through so many loader processes; step_in_memory: the same batches made
            before. wait: for the loader, of step_loaded. read: to read, check and collate a batch in one process. The
            shares are of step_in_memory; read_share is what the loader takes from a step if no core is idle
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cases import DTYPES
from benchmarks.cases import TOP_K as K
from benchmarks.floor import products, timed
from benchmarks.measure import reset_high_water_mark, resident_mib
from benchmarks.process import environment
from dadpo_kernels import linear_topk_logps, topk_divergence
from dadpo_kernels.cache.dataset import PairCollator, PairDataset
from dadpo_kernels.cache.pairs import pad_pairs
from dadpo_kernels.cache.sampler import ShardSampler
from dadpo_kernels.capture.local import capture_teacher
from dadpo_kernels.capture.pairs import read_pairs, tokenize_pairs
from dadpo_kernels.models.lm_head import lm_head
from dadpo_kernels.train.config import DaDPOConfig
from dadpo_kernels.train.trainer import DaDPOTrainer
from examples.smollm2 import smollm2_dir, smollm2_hidden

PAIRS = Path(__file__).parent.parent / "examples" / "quickstart" / "data" / "train.jsonl"
REPEATS = 3
SEED = 0


def dense_topk(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logps = torch.mm(hidden, weight.t()).float().log_softmax(-1)
    return *logps.topk(K), logps.gather(1, labels[:, None])


def head(tokens: list[int], dtype: torch.dtype) -> list[dict]:
    hidden, weight, labels = smollm2_hidden(max(tokens), dtype)
    rows = []
    for n in tokens:
        h, y = hidden[:n], labels[:n]

        def ours(h=h, y=y) -> object:
            return linear_topk_logps(h, weight, K, labels=y)

        def dense(h=h, y=y) -> object:
            return dense_topk(h, weight, y)

        row: dict = {"tokens": n}
        for name, call in (("ours_mib", ours), ("dense_mib", dense)):
            call()
            before = reset_high_water_mark()
            call()
            row[name] = resident_mib("VmHWM") - before
        gemm = min((run for product, _, run in products(h, weight) if product == "logits"), key=timed)
        times: dict[str, list[float]] = {"gemm": [], "ours": [], "dense": []}
        for _ in range(REPEATS):
            times["gemm"].append(timed(gemm))
            times["ours"].append(timed(ours))
            times["dense"].append(timed(dense))
        row |= {name: statistics.median(values) for name, values in times.items()}
        rows.append(row)
        print(row, flush=True)
    return rows


def captured(directory: Path, pairs: int):
    """`(model, cache, seconds)` of a capture of that many pairs."""
    source = smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    data = tokenize_pairs(read_pairs(PAIRS, pairs), tokenizer, 1024)
    start = time.perf_counter()
    capture_teacher(model, tokenizer, data, directory, k=K, shard_tokens=2048)
    return model, PairDataset(directory, tokenizer=tokenizer), time.perf_counter() - start


@torch.inference_mode()
def cache(pairs: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        model, dataset, seconds = captured(Path(directory), pairs)
        tokens = sum(shard.tokens for shard in dataset.manifest.shards)
        weight = lm_head(model).weight
        exact, cached = [], []
        for i in range(len(dataset)):
            item = dataset[i]
            input_ids, attention_mask, labels = pad_pairs([item["pair"]], 0)
            out = model.model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
            early = model.model.norm(out.hidden_states[-6])
            for row, side in enumerate(("chosen", "rejected")):
                valid = labels[row] != -100
                teacher, student = (
                    (hidden[row][valid] @ weight.t()).double().log_softmax(-1)
                    for hidden in (out.last_hidden_state, early)
                )
                ids = torch.from_numpy(item[f"{side}_topk_ids"]).long()

                def split(logps: Tensor, ids=ids) -> tuple[Tensor, Tensor]:
                    return logps.gather(1, ids), logps.scatter(1, ids, -torch.inf).logsumexp(1)

                student_topk, student_tail = split(student)
                exact.append(topk_divergence(student_topk, student_tail, *split(teacher)))
                stored = [torch.from_numpy(item[f"{side}_{name}"]).double() for name in ("topk_logps", "topk_tail")]
                cached.append(topk_divergence(student_topk, student_tail, *stored))
        a, b = torch.cat(exact), torch.cat(cached)
        return {
            "tokens": tokens,
            "bytes_per_token": sum(shard.bytes for shard in dataset.manifest.shards) / tokens,
            "tokens_per_second": tokens / seconds,
            "kl_exact": a.mean().item(),
            "kl_cached": b.mean().item(),
            "kl_error_mean": (a - b).abs().mean().item(),
            "kl_error_max": (a - b).abs().max().item(),
        }


class TimedTrainer(DaDPOTrainer):
    """Notes when each step begins, by asking for its batch, and how long it waits for that."""

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self.begun.append(start)
        self.waited.append(time.perf_counter() - start)
        return found


def steps(model, dataset, batch: int, workers: int, collator) -> tuple[list[float], list[float]]:
    """Seconds of each step but the first, and of its wait; each pair of the data set is seen once."""
    with tempfile.TemporaryDirectory() as directory:
        config = DaDPOConfig(
            directory, per_device_train_batch_size=batch, num_train_epochs=1, dataloader_num_workers=workers,
            seed=SEED, learning_rate=1e-6, beta_teacher=0.1, kl_weight=1.0, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = TimedTrainer(model, config, dataset, data_collator=collator)
        trainer.begun, trainer.waited = [], []
        trainer.train()
    begun = trainer.begun
    return [b - a for a, b in itertools.pairwise(begun[1:])], trainer.waited[1:-1]


def reader(pairs: int, batch: int, workers: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        model, dataset, _ = captured(Path(directory), pairs)
        collator = PairCollator(0)
        batches, read = [], []
        order = list(ShardSampler(dataset, seed=SEED, num_replicas=1, rank=0))  # the trainer's
        for first in range(0, pairs, batch):
            start = time.perf_counter()
            batches.append(collator([dataset[i] for i in order[first : first + batch]]))
            read.append(time.perf_counter() - start)
        loaded, waited, in_memory = [], [], []
        for _ in range(REPEATS - 1):
            seconds, wait = steps(model, dataset, batch, workers, collator)
            loaded += seconds
            waited += wait
            in_memory += steps(model, batches, 1, 0, lambda batches: batches[0])[0]
        result = {
            "pairs": batch,
            "tokens": sum(shard.tokens for shard in dataset.manifest.shards) * batch / pairs,
            "workers": workers,
            "step_loaded": statistics.median(loaded),
            "step_in_memory": statistics.median(in_memory),
            "wait": statistics.median(waited),
            "read": statistics.median(read),
        }
        return result | {f"{name}_share": result[name] / result["step_in_memory"] for name in ("wait", "read")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("head", "cache", "reader"))
    parser.add_argument("--out", required=True, type=Path, help="JSON file; its other sections stay")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048], help="for head")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for head")
    parser.add_argument("--pairs", type=int, default=16, help="for cache and reader: how many are captured")
    parser.add_argument("--batch", type=int, default=2, help="for reader: pairs a step")
    parser.add_argument("--workers", type=int, default=2, help="for reader: processes of the data loader")
    args = parser.parse_args()
    result: list | dict
    if args.part == "head":
        result = head(args.tokens, DTYPES[args.dtype])
    else:
        result = cache(args.pairs) if args.part == "cache" else reader(args.pairs, args.batch, args.workers)
    sections = json.loads(args.out.read_text()) if args.out.exists() else {}
    section = f"head/{args.dtype}" if args.part == "head" else args.part
    sections[section] = {"environment": environment(torch.get_num_threads()), "result": result}
    args.out.write_text(json.dumps(sections, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
