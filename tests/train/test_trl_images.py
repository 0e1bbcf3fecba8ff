"""Image preference data: TRL's collator and a vision-language model, its images through the fused head as well."""

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer

from dadpo_kernels import TRLDaDPOConfig, TRLDaDPOTrainer
from tests.support.tiny import chat_records, tiny_tokenizer
from tests.train.test_trl_trainer import SETTINGS, assert_same_run, run

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = "<image>"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def processor():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(IMAGE, special_tokens=True)
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return hf.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=IMAGE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)

    def record(messages: dict) -> dict:
        text = {name: turns[0]["content"] for name, turns in messages.items()}
        image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        return text | {"prompt": IMAGE + text["prompt"], "images": [image]}

    return Dataset.from_list([record(messages) for messages in chat_records(8)])


def llava(processor):
    torch.manual_seed(1)
    text = hf.LlamaConfig(vocab_size=320, initializer_range=0.3, bos_token_id=None, eos_token_id=2, **SIZES)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=text,
            vision_config=hf.CLIPVisionConfig(image_size=16, patch_size=8, **SIZES),
            image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=4,
        )
    )


def test_without_a_teacher_it_is_trls_run(processor, data, tmp_path):
    theirs, ours = (
        run(trainer, config, tmp_path / trainer.__name__, 12, llava(processor), llava(processor), data, processor)
        for trainer, config in ((DPOTrainer, DPOConfig), (TRLDaDPOTrainer, TRLDaDPOConfig))
    )
    assert_same_run(ours, theirs)
    before, want = dict(llava(processor).named_parameters()), dict(theirs.model.named_parameters())
    for name, value in ours.model.named_parameters():
        torch.testing.assert_close(value, want[name], atol=1e-4, rtol=1e-3)
    projector = "model.multi_modal_projector.linear_1.weight"  # what the images pass through
    assert (want[projector] - before[projector]).abs().max() > 1e-3


def test_a_teacher_needs_a_collator_that_brings_it(processor, data, tmp_path):
    args = TRLDaDPOConfig(str(tmp_path), beta_teacher=0.2, **SETTINGS)
    trainer = TRLDaDPOTrainer(llava(processor), llava(processor), args, train_dataset=data, processing_class=processor)
    with pytest.raises(ValueError, match=r"does not have teacher_label_logps.*in your data_collator"):
        trainer.train()
