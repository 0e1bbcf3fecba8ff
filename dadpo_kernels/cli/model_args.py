"""What the commands that run a frozen model over pairs share."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..cache.shards import Manifest


def add_model_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME|DIR", help=f"{what}: a model of the hub or a directory"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--gguf-file", metavar="FILE", help="a GGUF file in that place")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: the checkpoint's on an accelerator, float32 on a CPU",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: all accelerators, else the CPU"
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a server runs the model",
        "vLLM, SGLang, or another that answers like one of them; --model then names its tokenizer and configuration "
        "only",
    )
    group.add_argument("--server", metavar="URL", help="http://HOST:PORT")
    group.add_argument(
        "--engine",
        choices=("vllm", "sglang"),
        default="vllm",
        help="its interface: /v1/completions with prompt_logprobs, or /generate with return_logprob (%(default)s)",
    )
    group.add_argument("--served-name", metavar="NAME", help="name of the model there, if it serves several")
    group.add_argument(
        "--concurrency", type=int, default=32, metavar="N", help="requests under way at a time (%(default)s)"
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds until an answer is complete (%(default)g)"
    )
    group.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the server's API key")


def add_pass_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="padded tokens a forward pass; lower it when memory runs out (%(default)s)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=65536,
        metavar="N",
        help="answer tokens a file: what an interruption costs at most (%(default)s)",
    )


def is_first_process() -> bool:
    """Whether this is the process that talks to the user, of those that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def load(args: argparse.Namespace) -> Any:
    from ..capture.load import load_model

    return load_model(
        args.model, revision=args.revision, gguf_file=args.gguf_file, dtype=args.dtype, device=args.device
    )


def connect(args: argparse.Namespace) -> Any:
    from ..capture.server import CompletionsServer, SGLangServer

    api_key = None
    if args.api_key_env is not None:
        api_key = os.environ.get(args.api_key_env)
        if not api_key:
            raise ValueError(f"--api-key-env: the environment variable {args.api_key_env} is not set")
    engine = {"vllm": CompletionsServer, "sglang": SGLangServer}[args.engine]
    return engine(args.server, model=args.served_name, api_key=api_key, timeout=args.timeout)


def print_summary(directory: Path, manifest: "Manifest") -> None:
    tokens = sum(shard.tokens for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    counts = f"{manifest.settings['pairs']} pairs, {tokens} answer tokens, {len(manifest.shards)} shard(s)"
    if is_first_process():
        print(f"{directory}: {counts}, {size / tokens:.1f} bytes a token")
