"""Three trainers in the situations of their users: the plain trainer's numbers, or a refusal at once.

patched    transformers.Trainer with `patch(model)`, against the same without the patch
trl        TRLDaDPOTrainer without a teacher, against TRL's DPOTrainer
dadpo      DaDPOTrainer without a teacher, against TRLDaDPOTrainer on the same cache, all pairs in a batch
"""

from pathlib import Path

import accelerate
import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from dadpo_kernels import DaDPOConfig, DaDPOTrainer, TRLDaDPOConfig, TRLDaDPOTrainer, patch
from dadpo_kernels.cache.dataset import PairDataset
from dadpo_kernels.capture.local import capture_reference, capture_teacher
from dadpo_kernels.capture.pairs import tokenize_pairs
from tests.models.test_patch import OwnLoss
from tests.support.ranks import run_ranks
from tests.support.tiny import chat_records, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
TRAINERS = ["patched", "trl", "dadpo"]
SETTINGS = {
    "max_steps": 4, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 2, "learning_rate": 5e-3,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
}  # fmt: skip
RECORDS = chat_records(6, seed=3)
ROWS = [{"input_ids": (ids := list(range(3, 3 + n))), "labels": [-100, *ids[1:]]} for n in (5, 9, 4, 7, 6, 8)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "pairs"
    capture_teacher(tiny_llama(seed=3), TOKENIZER, tokenize_pairs(RECORDS, TOKENIZER, 64), directory, k=6)
    capture_reference(tiny_llama(), TOKENIZER, directory)
    return directory


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Its precision is one for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def sets(kind: str, cache: Path, data=None):
    """The training set, or the same thing for another one: `data` is a slice of it."""
    part = slice(None) if data is None else data
    if kind == "patched":
        return ROWS[part]
    if kind == "trl":
        return Dataset.from_list(RECORDS[part])
    return PairDataset(cache)


def trainer(kind: str, ours: bool, cache: Path, out: Path, model=None, evaluation=None, **options):
    """A trainer of a kind, ours or the plain one."""
    model = tiny_llama() if model is None else model
    options = SETTINGS | {"output_dir": str(out)} | options
    arguments = {"train_dataset": sets(kind, cache), "eval_dataset": evaluation}
    extra = {name: options.pop(name) for name in ("compute_metrics",) if name in options}
    if kind == "patched":
        collator = hf.DataCollatorForSeq2Seq(TOKENIZER, padding=True)
        TOKENIZER.pad_token = TOKENIZER.eos_token
        return hf.Trainer(
            patch(model) if ours else model, hf.TrainingArguments(**options), collator, **arguments, **extra
        )
    if kind == "dadpo" and ours:
        return DaDPOTrainer(
            model, DaDPOConfig(**options, beta_ref=0.1), **arguments, processing_class=TOKENIZER, **extra
        )
    if kind == "trl" and not ours:
        options, reference = DPOConfig(**options, beta=0.1), tiny_llama()
        return DPOTrainer(model, reference, options, **arguments, processing_class=TOKENIZER, **extra)
    reference = tiny_llama() if kind == "trl" else None
    options = TRLDaDPOConfig(**options, beta=0.1, max_length=None if kind == "dadpo" else 1024)
    return TRLDaDPOTrainer(model, reference, options, **arguments, processing_class=TOKENIZER, **extra)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(kind, cache, out, tolerance=1e-4, make=tiny_llama, **options):
    """Losses of four steps and the parameters after them; returns our trainer and the plain one."""
    trainers = []
    for ours in (True, False):
        t = trainer(kind, ours, cache, out / str(ours), make(), **options)
        t.train()
        trainers.append(t)
    got, want = map(losses, trainers)
    assert len(want) == 4
    assert abs(want[-1] - want[0]) > 1e-2
    assert got == pytest.approx(want, rel=tolerance, abs=tolerance)
    return trainers


@pytest.mark.parametrize("kind", TRAINERS)
class TestMatrix:
    def test_train(self, kind, cache, tmp_path):
        ours, plain = assert_same(kind, cache, tmp_path)
        for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)

    def test_resume(self, kind, cache, tmp_path):
        """After two of four steps, in a new trainer: the last two losses again."""
        whole = trainer(kind, True, cache, tmp_path, save_strategy="steps", save_steps=2)
        whole.train()
        again = trainer(kind, True, cache, tmp_path)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert losses(again) == losses(whole)
        for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_evaluate(self, kind, cache, tmp_path):
        got, want = (
            trainer(kind, ours, cache, tmp_path, evaluation=sets(kind, cache)).evaluate() for ours in (True, False)
        )
        assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-4)

    def test_evaluate_several_sets(self, kind, cache, tmp_path):
        results = []
        for ours in (True, False):
            several = {"a": sets(kind, cache), "b": sets(kind, cache, slice(2))}
            t = trainer(kind, ours, cache, tmp_path, evaluation=several, eval_strategy="steps", eval_steps=2)
            t.train()
            results.append([e for e in t.state.log_history if "eval_a_loss" in e or "eval_b_loss" in e])
        got, want = results
        assert len(want) == 4
        for a, b in zip(got, want, strict=True):
            (name,) = (name for name in b if name.endswith("_loss"))
            assert a[name] == pytest.approx(b[name], rel=1e-4)
        direct = trainer(kind, True, cache, tmp_path).evaluate({"c": sets(kind, cache)})
        assert "eval_c_loss" in direct

    def test_predict(self, kind, cache, tmp_path):
        ours = trainer(kind, True, cache, tmp_path)
        if kind == "dadpo":
            with pytest.raises(ValueError, match=r"predict\(\) would return logits"):
                ours.predict(sets(kind, cache))
        elif kind == "patched":
            got = ours.predict(ROWS)
            logits, labels, metrics = trainer(kind, False, cache, tmp_path).predict(ROWS)
            assert got.metrics["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-4)
            want = (
                torch.tensor(logits).log_softmax(-1)[:, :-1].gather(-1, torch.tensor(labels)[:, 1:, None].clamp(min=0))
            )
            valid = labels[:, 1:] != -100
            torch.testing.assert_close(torch.tensor(got.predictions)[:, :-1][valid], want[..., 0][valid])
        else:
            with pytest.raises(ValueError, match="set prediction_loss_only=True"):
                ours.predict(ours.train_dataset)
            results = []
            for ours in (True, False):
                t = trainer(kind, ours, cache, tmp_path, prediction_loss_only=True)
                results.append(t.predict(t.train_dataset).metrics["test_loss"])
            assert results[0] == pytest.approx(results[1], rel=1e-4)

    def test_compute_metrics(self, kind, cache, tmp_path):
        def compute_metrics(prediction):
            return {"shape": tuple(prediction.predictions.shape)}

        if kind == "dadpo":
            with pytest.raises(ValueError, match="compute_metrics="):
                trainer(kind, True, cache, tmp_path, compute_metrics=compute_metrics)
        elif kind == "patched":
            t = trainer(kind, True, cache, tmp_path, compute_metrics=compute_metrics, evaluation=ROWS)
            assert t.evaluate()["eval_shape"] == (6, 9)
        else:
            results = [
                trainer(
                    kind, ours, cache, tmp_path, compute_metrics=compute_metrics, evaluation=sets(kind, cache)
                ).evaluate()
                for ours in (True, False)
            ]
            assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-4)

    def test_torch_compile(self, kind, cache, tmp_path):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = trainer(kind, True, cache, tmp_path, torch_compile=True, torch_compile_backend="eager")
        compiled.train()
        assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 50  # the model's body
        plain = trainer(kind, True, cache, tmp_path)
        plain.train()
        assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)

    def test_second_stage_after_bfloat16(self, kind, cache, tmp_path):
        """accelerate leaves its autocast on the model's forward."""

        def make():
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
            model = tiny_llama()
            trainer("patched", False, cache, tmp_path / "first", model, bf16=True, max_steps=2).train()
            assert "forward" in vars(model)
            return model

        ours, plain = assert_same(kind, cache, tmp_path, 0.02, make, bf16=True)
        assert losses(ours) != losses(plain)

    def test_gradient_checkpointing(self, kind, cache, tmp_path):
        results = []
        for checkpointing in (True, False):
            t = trainer(kind, True, cache, tmp_path, gradient_checkpointing=checkpointing)
            t.train()
            results.append(losses(t))
        assert results[0] == pytest.approx(results[1], rel=1e-5)

    def test_lora(self, kind, cache, tmp_path):
        def make():
            torch.manual_seed(1)
            return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))

        assert_same(kind, cache, tmp_path, make=make, learning_rate=0.1)

    def test_qlora(self, kind, cache, tmp_path):
        """On a CPU with AVX512-BF16, a forward of a check would have ended the training of a 4-bit model."""
        pytest.importorskip("bitsandbytes")
        nf4 = hf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, initializer_range=0.3,
        )  # fmt: skip
        hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")

        def make():
            model = hf.AutoModelForCausalLM.from_pretrained(
                tmp_path / "model", quantization_config=nf4, device_map={"": "cpu"}, dtype=torch.bfloat16
            )
            torch.manual_seed(1)
            return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))

        assert_same(kind, cache, tmp_path, 0.05, make, learning_rate=2e-2)

    def test_a_model_that_computes_its_loss_itself(self, kind, cache, tmp_path):
        """As remote code does: `patch` needs to find the loss, the other two need none of the model."""

        def make():
            model = tiny_llama()
            model.__class__ = OwnLoss
            return model

        if kind == "patched":
            with pytest.raises(ValueError, match="OwnLoss reads its logits"):
                trainer(kind, True, cache, tmp_path, make()).train()
        else:
            assert_same(kind, cache, tmp_path, make=make)

    def test_two_processes(self, kind, cache, tmp_path):
        want = trainer(kind, True, cache, tmp_path)
        want.train()
        for got in run_ranks(2, rank_losses, kind, str(cache), str(tmp_path)):
            assert got == pytest.approx(losses(want), rel=1e-3)


@pytest.mark.parametrize("generate", [False, True])
def test_seq2seq_trainer_on_a_patched_model(generate, tmp_path):
    """transformers' trainer that generates to evaluate, and rebuilds outputs by `type(x)(...)`."""
    TOKENIZER.pad_token = TOKENIZER.eos_token
    results = []
    for ours in (True, False):
        model = tiny_llama()
        model.config.pad_token_id = model.generation_config.pad_token_id = 2
        args = hf.Seq2SeqTrainingArguments(
            str(tmp_path), predict_with_generate=generate, generation_max_length=14, use_cpu=True, report_to="none",
            per_device_eval_batch_size=2, disable_tqdm=True,
        )  # fmt: skip
        collator = hf.DataCollatorForSeq2Seq(TOKENIZER, padding=True)
        t = hf.Seq2SeqTrainer(patch(model) if ours else model, args, collator, processing_class=TOKENIZER)
        results.append((t.evaluate(ROWS)["eval_loss"], t.predict(ROWS).predictions))
    (loss, predictions), (want_loss, want) = results
    assert loss == pytest.approx(want_loss, rel=1e-5)
    if generate:
        assert (predictions == want).all()
    else:
        assert predictions.shape == want.shape[:2]


def rank_losses(kind: str, cache: str, out: str) -> list[float]:
    t = trainer(kind, True, Path(cache), Path(out), per_device_train_batch_size=3)
    t.train()
    return losses(t)
