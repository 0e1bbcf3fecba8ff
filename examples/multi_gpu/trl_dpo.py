"""TRL's DPO trainer with a teacher, on any number of processes. Options are those of TRL's DPOConfig and ours.

    accelerate launch --config_file examples/multi_gpu/fsdp2.yaml examples/multi_gpu/trl_dpo.py \\
        --model STUDENT --cache CACHE --output_dir OUT --beta 0.1 --beta_teacher 0.1 --kl_weight 0.5
"""

from dataclasses import dataclass

from transformers import AutoTokenizer, HfArgumentParser

from dadpo_kernels import TRLDaDPOConfig, TRLDaDPOTrainer
from dadpo_kernels.cache.dataset import PairDataset


@dataclass
class Sources:
    model: str
    cache: str


def main(words: list[str] | None = None) -> None:
    sources, config = HfArgumentParser([Sources, TRLDaDPOConfig]).parse_args_into_dataclasses(words)  # type: ignore[list-item]
    tokenizer = AutoTokenizer.from_pretrained(sources.model)
    data = PairDataset(sources.cache, tokenizer=tokenizer)
    trainer = TRLDaDPOTrainer(sources.model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
