"""What the commands that run a frozen model over pairs share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..teacher.shards import Manifest


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


def load(args: argparse.Namespace) -> Any:
    from ..teacher.load import load_model

    return load_model(
        args.model, revision=args.revision, gguf_file=args.gguf_file, dtype=args.dtype, device=args.device
    )


def summary(directory: Path, manifest: "Manifest") -> str:
    tokens = sum(shard.tokens for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    counts = f"{manifest.settings['pairs']} pairs, {tokens} answer tokens, {len(manifest.shards)} shard(s)"
    return f"{directory}: {counts}, {size / tokens:.1f} bytes a token"
