"""How the quickstart's preference pairs were made (they are committed; this takes about 15 minutes on 2 cores).

    python -m examples.quickstart.make_pairs

As in daDPO (arXiv 2506.15717): the teacher answers every prompt, the pruned student first learns from these answers
(SFT), and then answers the prompts itself; the teacher's answer is chosen, the student's rejected. Every sixth prompt
is held out: no stage of any training sees it.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dadpo_kernels import linear_selected_logps
from dadpo_kernels.models.forward import hidden_states
from dadpo_kernels.models.lm_head import lm_head
from examples.quickstart.prune import DATA, prune
from examples.smollm2 import smollm2_dir

MAX_NEW_TOKENS = 80
PUBLISHED = ("train", "heldout")


def split() -> dict[str, list[str]]:
    prompts = (DATA / "prompts.txt").read_text().splitlines()
    return {
        "train": [p for i, p in enumerate(prompts) if i % 6 != 5],
        "heldout": [p for i, p in enumerate(prompts) if i % 6 == 5],
    }


def encode(tokenizer: PreTrainedTokenizerBase, chats: list, **options: Any) -> Any:
    """`input_ids` and `attention_mask` of chats, by the tokenizer's template."""
    return tokenizer.apply_chat_template(chats, return_dict=True, **options)


@torch.no_grad()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int) -> list[str]:
    """One sampled answer for each prompt (temperature 0.7, top-p 0.95), without special tokens."""
    torch.manual_seed(seed)
    model.eval()
    tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(prompts), 56):
        chats = [[{"role": "user", "content": p}] for p in prompts[start : start + 56]]
        batch = encode(tokenizer, chats, add_generation_prompt=True, padding=True, return_tensors="pt")
        out = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=0.7, top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{len(answers)}/{len(prompts)} answers", flush=True)
    return [whole_sentences(a.strip()) for a in answers]


def whole_sentences(text: str) -> str:
    """Up to the last full stop: an answer that met the limit should not teach that answers end in mid-sentence."""
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] or text


def sft(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]) -> None:
    """Two passes of plain cross entropy on the teacher's answers: the fused primitive in a loop of one's own."""
    tokenizer.padding_side = "right"
    model.train()
    head = lm_head(model)
    steps = 2 * (len(chats) // 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, total_steps=steps, pct_start=0.1)
    order = random.Random(0)
    for step in range(steps):
        picked = order.sample(chats, 8)
        batch = encode(tokenizer, picked, padding=True, return_tensors="pt")
        prompts = [len(encode(tokenizer, c[:1], add_generation_prompt=True)["input_ids"]) for c in picked]
        labels = batch["input_ids"].roll(-1, 1).masked_fill(batch["attention_mask"].roll(-1, 1) == 0, -100)
        labels[:, -1] = -100
        for row, prompt in zip(labels, prompts, strict=True):
            row[: prompt - 1] = -100
        with torch.autocast("cpu", torch.bfloat16):
            hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
            logps = linear_selected_logps(hidden, head.weight, labels).label
        loss = -logps.sum() / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"SFT step {step}/{steps}: NLL {loss.item():.3f}", flush=True)


def write(name: str, prompts: list[str], chosen: list[str], rejected: list[str]) -> None:
    """Conversational pairs, one JSON object a line; a pair of equal or empty answers says nothing and is left out."""
    with (DATA / f"{name}.jsonl").open("w") as file:
        for p, c, r in zip(prompts, chosen, rejected, strict=True):
            if c and r and c != r:
                roles = {"prompt": ("user", p), "chosen": ("assistant", c), "rejected": ("assistant", r)}
                row = {k: [{"role": role, "content": text}] for k, (role, text) in roles.items()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(work: Path = Path("runs/pairs")) -> None:
    teacher_dir = smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    prompts = split()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.bfloat16)
    chosen = {name: answer(teacher, tokenizer, prompts[name], seed=i) for i, name in enumerate(PUBLISHED)}
    del teacher
    student = AutoModelForCausalLM.from_pretrained(prune(teacher_dir, work / "pruned"), dtype=torch.float32)
    roles = ("user", "assistant")
    sft(
        student,
        tokenizer,
        [
            [{"role": r, "content": t} for r, t in zip(roles, pair, strict=True)]
            for pair in zip(prompts["train"], chosen["train"], strict=True)
        ],
    )
    student = student.bfloat16()
    for i, name in enumerate(PUBLISHED):
        write(name, prompts[name], chosen[name], answer(student, tokenizer, prompts[name], seed=10 + i))


if __name__ == "__main__":
    main()
