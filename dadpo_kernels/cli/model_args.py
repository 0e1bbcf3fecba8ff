"""Arguments and functions that the commands with a frozen model share."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .values import at_least

if TYPE_CHECKING:
    from ..cache.shards import Manifest


def add_model_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME|DIR", help=f"{what}: a model on the hub or a directory"
    )
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--gguf-file", metavar="FILE", help="a GGUF file in that repository or directory")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto is the checkpoint's on an accelerator, and float32 on a CPU",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is all accelerators, else the CPU"
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "inference server",
        "Let vLLM, SGLang or a compatible server run the teacher. --model is then only used for the tokenizer and the "
        "configuration.",
    )
    group.add_argument("--server", metavar="URL", help="http://HOST:PORT")
    group.add_argument(
        "--engine",
        choices=("vllm", "sglang"),
        default="vllm",
        help="interface: /v1/completions with prompt_logprobs, or /generate with return_logprob (default %(default)s)",
    )
    group.add_argument("--served-name", metavar="NAME", help="the model's name on the server, if it serves several")
    group.add_argument(
        "--concurrency", type=int, default=32, metavar="N", help="simultaneous requests (default %(default)s)"
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds until a response must be complete (default %(default)g)",
    )
    group.add_argument("--api-key-env", metavar="VAR", help="environment variable that contains the server's API key")


def add_capture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-tokens",
        type=at_least(1),
        default=4096,
        metavar="N",
        help="padded tokens per forward pass; lower it if memory runs out (default %(default)s)",
    )
    add_shard_argument(parser)


def add_shard_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-tokens",
        type=at_least(1),
        default=65536,
        metavar="N",
        help="answer tokens per file, which is the most that an interruption can lose (default %(default)s)",
    )


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, which alone prints."""
    return os.environ.get("RANK", "0") == "0"


def load(args: argparse.Namespace) -> Any:
    from ..capture.load import load_model

    return load_model(
        args.model, revision=args.revision, gguf_file=args.gguf_file, dtype=args.dtype, device=args.device
    )


def connect(args: argparse.Namespace) -> Any:
    from ..capture.address import clean_key
    from ..capture.server import CompletionsServer, SGLangServer, check_concurrency, check_timeout

    check_concurrency("--concurrency", args.concurrency)
    check_timeout("--timeout", args.timeout)
    api_key = None
    if args.api_key_env is not None:
        api_key = os.environ.get(args.api_key_env)
        if api_key is None:
            raise ValueError(f"--api-key-env: the environment variable {args.api_key_env} is not set")
        api_key = clean_key(f"--api-key-env: the environment variable {args.api_key_env}", api_key)
    engine = {"vllm": CompletionsServer, "sglang": SGLangServer}[args.engine]
    return engine(args.server, model=args.served_name, api_key=api_key, timeout=args.timeout)


def print_summary(directory: Path, manifest: "Manifest") -> None:
    tokens = sum(shard.tokens for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    counts = f"{manifest.settings['pairs']} pairs, {tokens} answer tokens, {len(manifest.shards)} shard(s)"
    if is_first_process():
        print(f"{directory}: {counts}, {size / tokens:.1f} bytes per token")
