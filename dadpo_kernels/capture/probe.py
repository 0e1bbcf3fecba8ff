"""Asks a server for one sequence twice, in different company, before a capture trusts it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np

from ..cache.format import Targets
from .errors import ResponseError, ServerError

COMPANY = 3  # further sequences, with which the first one is sent again
_TOLERANCE = 0.25  # nats


def probe(
    score: Callable[[int], Targets], executor: Executor, numbers: Sequence[int], hint: str
) -> dict[int, Targets]:
    """Score the first sequence alone, then all others at once and the first one again.

    A server that cannot score is found by its first response, before many requests wait for their retries. A server
    whose responses depend on other requests is found by the second response: vLLM's `prompt_logprobs` of a prefix in
    its cache can be those of another request (vllm-project/vllm issue 42019).

    The label's log-probabilities of both responses may differ by 0.25 nats, root mean square over the answer. The
    size of a batch changes an engine's kernels and with them the last bit of its logits: in bfloat16, logits between
    16 and 32 are 0.125 apart, and a log-probability, the difference of a logit and the log-sum-exp, moves by two such
    steps at most, at some positions. Values of other tokens differ by several nats.

    Args:
        score: scores a sequence by its number, and tries again where that can help. It is called from threads.
        executor: runs the simultaneous requests.
        numbers: of the first sequence and of the others, which should not be shorter: what they leave in a server's
            memory then reaches to the end of the first.
        hint: what to do about a server that answers differently.

    Returns:
        The targets of all `numbers`.

    Raises:
        ServerError: the two responses differ.
        ServerError, ResponseError: a request failed.
    """
    first, *others = numbers
    targets = {first: score(first)}
    requests = {i: executor.submit(score, i) for i in (*others, first)}
    targets |= {i: requests[i].result() for i in others}
    try:
        again = requests[first].result()["label_logps"]
    except ResponseError as error:
        raise ServerError(f"the server's second response for the same tokens is malformed: {error}. {hint}") from None
    difference = np.sqrt(np.mean((again.astype(np.float64) - targets[first]["label_logps"]) ** 2))
    if not difference <= _TOLERANCE:
        raise ServerError(
            f"the server gives other log-probabilities for the same {len(again)} tokens when it has scored others in "
            f"between: {difference:.2f} nats apart (root mean square; {_TOLERANCE} are allowed for rounding). {hint}"
        )
    return targets
