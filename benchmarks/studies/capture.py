"""What a teacher's capture costs, what its cache loses, and what reading it costs a training step, on SmolLM2-135M.

    python -m benchmarks.studies.capture --out benchmarks/results/capture.json

Three parts (k = 64), of which `--part` chooses:

    head    `linear_topk_logps` with labels, its dense equivalent (`log_softmax(logits).topk(k)`, and the label's
            gathered), and the product that makes the logits, into memory that exists, in its fastest arrangement
            (`benchmarks.floor`). Memory is the growth of the resident set
    cache   of real pairs: forward KL to a student (the same model without its last five layers) over top-k and tail,
            from the teacher's float64 values and from the cache's, in nats a token
    reader  a step of `DaDPOTrainer`: from one step's start to the next, with batches from the cache through loader
            processes (`step_loaded`, of which it waits `wait` for them) and with the same batches made before
            (`step_in_memory`); `read` is to read, check and collate a batch in one process. Medians
"""

import itertools
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
from benchmarks.process import arguments, environment
from benchmarks.rows import Cell, Rows, caption, measured, of, save, show, table
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

STUDY = "capture"
PAIRS = Path(__file__).parents[2] / "examples" / "quickstart" / "data" / "train.jsonl"
PARTS = ("head", "cache", "reader")
REPEATS = 3
SEED = 0


def dense_topk(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logps = torch.mm(hidden, weight.t()).float().log_softmax(-1)
    return *logps.topk(K), logps.gather(1, labels[:, None])


def head(tokens: list[int], dtype: str, machine: dict) -> Rows:
    hidden, weight, labels = smollm2_hidden(max(tokens), DTYPES[dtype])
    rows = Rows()
    for n in tokens:
        h, y = hidden[:n], labels[:n]
        gemm = min((run for product, _, run in products(h, weight) if product == "logits"), key=timed)
        calls = {
            "product": gemm,
            "ours": lambda h=h, y=y: linear_topk_logps(h, weight, K, labels=y),
            "dense": lambda h=h, y=y: dense_topk(h, weight, y),
        }
        memory = {}
        for name in ("ours", "dense"):
            calls[name]()
            before = reset_high_water_mark()
            calls[name]()
            memory[name] = resident_mib("VmHWM") - before
        times = [{name: timed(call) for name, call in calls.items()} for _ in range(REPEATS)]
        for name in calls:
            metrics = {"time, s": statistics.median(t[name] for t in times), "peak, MiB": memory.get(name)}
            rows += measured(STUDY, machine, metrics, part="head", dtype=dtype, tokens=n, plan=name)
            print(n, name, metrics, flush=True)
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
            "size, bytes a token": sum(shard.bytes for shard in dataset.manifest.shards) / tokens,
            "rate, tokens/s": tokens / seconds,
            "kl_exact": a.mean().item(),
            "kl_cached": b.mean().item(),
            "kl_error_mean": (a - b).abs().mean().item(),
            "kl_error_max": (a - b).abs().max().item(),
        }


class TimedTrainer(DaDPOTrainer):
    """Notes when each step begins, by asking for its batch, and how long it waits for that."""

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.begun.append(start)
        self.waited.append(time.perf_counter() - start)
        return batches


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
        return {
            "pairs": batch,
            "tokens": sum(shard.tokens for shard in dataset.manifest.shards) * batch / pairs,
            "workers": workers,
            "step_loaded, s": statistics.median(loaded),
            "step_in_memory, s": statistics.median(in_memory),
            "wait, s": statistics.median(waited),
            "read, s": statistics.median(read),
        }


def capture(rows: Rows) -> str:
    rows = rows.where(STUDY)

    def over_product(plan: str) -> Cell:
        return lambda line: f"{line.get('time', plan=plan) / line.get('time', plan='product'):.2f}"

    head = [
        ("answer tokens", of("tokens", ",")),
        ("dtype", of("dtype")),
        ("one product, s", show("time", ".2f", plan="product")),
        ("dadpo-kernels, products", over_product("ours")),
        ("dense `log_softmax().topk()`, products", over_product("dense")),
        ("peak MiB", show("peak", ".0f", plan="ours")),
        ("dense: peak MiB", show("peak", ".0f", plan="dense")),
    ]
    cache = [
        ("answer tokens in the cache", show("tokens", ",.0f")),
        ("bytes a token", show("size", ".0f")),
        ("KL to a student, nats a token", show("kl_exact", ".3f")),
        ("from the cache's float16", show("kl_cached", ".3f")),
        ("apart: mean", show("kl_error_mean", ".1e")),
        ("most", show("kl_error_max", ".1e")),
    ]

    def of_step(metric: str) -> Cell:
        return lambda line: f"{1e3 * line.get(metric):.1f} ms ({line.get(metric) / line.get('step_in_memory'):.2%})"

    reader = [
        ("pairs of a step", show("pairs", ".0f")),
        ("answer tokens", show("tokens", ".0f")),
        ("step, batches in memory", show("step_in_memory", ".2f")),
        ("step, from the cache", show("step_loaded", ".2f")),
        ("loader processes", show("workers", ".0f")),
        ("wait for them", of_step("wait")),
        ("read and collate in one process", of_step("read")),
    ]
    parts = []
    for part, down, columns in (("head", ["dtype", "tokens"], head), ("cache", [], cache), ("reader", [], reader)):
        if part_rows := rows.where(part=part):
            source = caption(part_rows, f"studies.capture --part {part} --out benchmarks/results/capture.json")
            parts += [table(part_rows, down, columns), f"SmolLM2-135M, k = {K}. {source}"]
    return "\n\n".join(parts)


TABLES = {"capture": capture}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048], help="for head")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for head")
    parser.add_argument("--pairs", type=int, default=16, help="for cache and reader: how many are captured")
    parser.add_argument("--batch", type=int, default=2, help="for reader: pairs a step")
    parser.add_argument("--workers", type=int, default=2, help="for reader: processes of the data loader")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = environment(args.threads)
    if "head" in args.part:
        save(args.out, head(args.tokens, args.dtype, machine))
    if "cache" in args.part:
        save(args.out, measured(STUDY, machine, cache(args.pairs), part="cache"))
    if "reader" in args.part:
        save(args.out, measured(STUDY, machine, reader(args.pairs, args.batch, args.workers), part="reader"))


if __name__ == "__main__":
    main()
