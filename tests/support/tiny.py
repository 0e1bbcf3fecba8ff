"""A model, a tokenizer and pairs that are made in milliseconds, for tests that do not depend on their quality."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the teacher reads a long answer and the student writes short ones when nobody looks at its tokens"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>", "<|eos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|eos|>", chat_template=TEMPLATE)


def tiny_llama(
    vocab_size: int = 320, seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=None,
        bos_token_id=None, eos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def chat_records(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    return [
        {
            "prompt": [{"role": "user", "content": text(12)}],
            "chosen": [{"role": "assistant", "content": text(20)}],
            "rejected": [{"role": "assistant", "content": text(20)}],
        }
        for _ in range(n)
    ]
