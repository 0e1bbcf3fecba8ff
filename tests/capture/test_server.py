"""What a capture finds out about a server before it trusts it, and what no message about one may show."""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from dadpo_kernels.capture.errors import ResponseError, ServerError
from dadpo_kernels.capture.probe import COMPANY, probe
from dadpo_kernels.capture.server import CompletionsServer, SGLangServer
from dadpo_kernels.cli.main import main
from tests.capture import test_sglang, test_vllm
from tests.capture.test_vllm import IDS, MODEL, TOKENIZER, K, check, check_sent, expected, vllm  # noqa: F401
from tests.support import vllm_server
from tests.support.tiny import chat_records

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the probe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["missing", None])
@pytest.mark.parametrize("engine", [test_vllm, test_sglang], ids=["vllm", "sglang"])
def test_a_server_without_prompt_logprobs_is_refused_by_its_first_response(vllm, tmp_path, engine, value):  # noqa: F811
    def without(document):
        part, name = (
            (document["meta_info"], "input_token_logprobs")
            if engine is test_sglang
            else (document["choices"][0], "prompt_logprobs")
        )
        part[name] = None
        if value == "missing":
            del part[name]
        return document

    vllm.change = without
    with pytest.raises(
        ServerError, match=r"ignores the request for \w+_logprobs. (vLLM|SGLang), or a server with its"
    ):
        engine.capture(vllm, tmp_path, backoff=60)
    assert len(vllm.requests) == 1


def test_a_prefix_cache_that_gives_stale_values(vllm, tmp_path, expected):  # noqa: F811
    """vLLM issue 42019: a salt avoids it, and a server that ignores salts is refused before anything is stored."""
    vllm.prefix_cache = "unsalted"
    with pytest.raises(
        ServerError,
        match=r"other log-probabilities for the same \d+ tokens .*: [1-9]\S* nats apart .*"
        r"Start vLLM with --no-enable-prefix-caching",
    ):
        test_vllm.capture(vllm, tmp_path / "unsalted")
    assert len(vllm.served) == 2 + COMPANY
    assert not list((tmp_path / "unsalted").glob("*.parquet"))
    (store,) = (tmp_path / "unsalted").glob(".answers*")
    assert store.read_bytes().count(b"\n") == 1  # the settings only

    vllm.prefix_cache = "salted"
    vllm.served.clear()
    test_vllm.capture(vllm, tmp_path / "salted")
    check(tmp_path / "salted", expected)
    check_sent(vllm, probes=1)
    salts = [body["cache_salt"] for _, _, body in vllm.requests]
    assert len(set(salts)) == len(salts)


def run_probe(again, numbers=(5, 6, 2)):
    """Probe a server whose second response for the first sequence is `again`, or raises it."""
    asked = []

    def score(number):
        asked.append(number)
        if number == numbers[0] and number in asked[:-1]:
            if isinstance(again, Exception):
                raise again
            return {"label_logps": np.asarray(again, np.float32)}
        return {"label_logps": np.full(100, -number, np.float32)}

    with ThreadPoolExecutor(1) as executor:
        targets = probe(score, executor, numbers, "Do something")
    assert asked == [5, 6, 2, 5]  # alone, and again behind the others
    return targets


def test_the_probe_allows_rounding():
    rng = np.random.default_rng(0)
    noise = 0.125 * rng.integers(-1, 2, 100) + rng.normal(0, 0.05, 100)  # of the logits in bfloat16, and of the rest
    noise[0] = 1.5
    targets = run_probe(-5 + noise)
    assert [values["label_logps"][0] for values in targets.values()] == [-5, -6, -2]
    assert list(targets) == [5, 6, 2]


@pytest.mark.parametrize("wrong", [1, 16, 100])
def test_the_probe_finds_other_values(wrong):
    again = np.full(100, -5.0)
    again[:wrong] = -11.0
    with pytest.raises(ServerError, match=r"the same 100 tokens .*: \d.\d\d nats apart .*\. Do something"):
        run_probe(again)
    with pytest.raises(ServerError, match=r"second response for the same tokens is malformed: NaN. Do something"):
        run_probe(ResponseError("NaN"))
    with pytest.raises(ServerError, match="nats apart"):
        run_probe([np.nan] * 100)


# ---- secrets ---------------------------------------------------------------------------------------------------

SECRET = "s3cr3t-Kx9"


@pytest.fixture
def words(tmp_path):
    MODEL.config.save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in chat_records(8)))
    words = ["teacher", "--model", tmp_path / "teacher", "--data", tmp_path / "pairs.jsonl", "--out",
             tmp_path / "cache", "--k", K, "--max-length", 60]  # fmt: skip
    return [str(word) for word in words]


def grep_secret(directory, capsys, caplog):
    """All output, log lines and files since the last call, without the secret."""
    captured = capsys.readouterr()
    text = captured.out + captured.err + caplog.text
    files = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())
    assert SECRET not in text
    assert SECRET.encode() not in files
    return text


def repeat_the_key(handler):
    key = handler.headers["Authorization"]
    handler.reply({"error": f"Incorrect API key provided: {key}"}, 401)
    return True


def test_a_key_is_sent_and_never_shown(vllm, words, tmp_path, capsys, caplog, monkeypatch):  # noqa: F811
    caplog.set_level(logging.DEBUG)
    words += ["--server", vllm.url, "--api-key-env", "A_KEY"]
    for value in (f"{SECRET}\n", f"  {SECRET}\r\n\t"):
        monkeypatch.setenv("A_KEY", value)
        assert main(words) == 0
        assert vllm.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
        grep_secret(tmp_path, capsys, caplog)
    for value in (f"{SECRET}\nx", f"\x01{SECRET}", f"{SECRET}é", f"{SECRET}\x7f", " \n"):
        monkeypatch.setenv("A_KEY", value)
        assert main(words) == 2
        error = grep_secret(tmp_path, capsys, caplog)
        assert re.search("--api-key-env: the environment variable A_KEY (has control or non-ASCII|is empty)", error)
        with pytest.raises(ValueError, match=r"^api_key (has|is)"):
            CompletionsServer(vllm.url, api_key=value)
    for fault in (vllm_server.drop, vllm_server.half_a_body, repeat_the_key):
        vllm.faults = [fault] * 2
        server = CompletionsServer(vllm.url, api_key=SECRET, attempts=2, backoff=0.01)
        with closing(server), pytest.raises(ServerError) as raised:
            server.score(IDS, 1, K, lambda logprobs: logprobs)
        assert SECRET not in str(raised.value)
        grep_secret(tmp_path, capsys, caplog)
    assert "Incorrect API key provided: Bearer [the API key]" in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:{secret}@{host}",
        "http://{secret}@{host}",
        "http://{host}/v1?key={secret}",
        "http://{host}#{secret}",
        "user:{secret}@{host}",
        "http://user:{secret}@[::1",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_shown(vllm, words, tmp_path, capsys, caplog, url):  # noqa: F811
    caplog.set_level(logging.DEBUG)
    assert main([*words, "--server", url.format(secret=SECRET, host=vllm.url.removeprefix("http://"))]) == 2
    assert "URL must not hold a user, a password, a query or a fragment" in grep_secret(tmp_path, capsys, caplog)
    assert not vllm.requests


def test_where_a_redirect_leads_is_shown_without_its_secrets(vllm):  # noqa: F811
    target = f"http://user:{SECRET}@other:80/login?token={SECRET}#{SECRET}"
    vllm.faults = [vllm_server.status(302, [("Location", target)])]
    with (
        closing(SGLangServer(vllm.url)) as server,
        pytest.raises(ServerError, match="to http://other/login, and") as e,
    ):
        server.score(IDS, 1, K, lambda logprobs: logprobs)
    assert SECRET not in str(e.value)


def test_a_proxy_of_the_environment_is_not_shown(vllm, monkeypatch):  # noqa: F811
    for proxy in (f"htp://user:{SECRET}@host", f"http://user:{SECRET}@host:x"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        with pytest.raises(ValueError, match=r"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not a URL") as error:
            CompletionsServer(vllm.url)
        assert SECRET not in str(error.value)


# ---- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--concurrency", "0", "--concurrency must be at least 1, got 0"),
        ("--concurrency", "-3", "--concurrency must be at least 1, got -3"),
        ("--timeout", "-1", "--timeout must be above 0 and at most 1e+06 seconds, got -1.0"),
        ("--timeout", "0", "--timeout must be above 0 and at most 1e+06 seconds, got 0.0"),
        ("--timeout", "nan", "--timeout must be above 0 and at most 1e+06 seconds, got nan"),
        ("--timeout", "inf", "--timeout must be above 0 and at most 1e+06 seconds, got inf"),
    ],
)
def test_arguments_out_of_range(vllm, words, capsys, flag, value, message):  # noqa: F811
    assert main([*words, "--server", vllm.url, flag, value]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"dadpo teacher: {message}"
    assert not vllm.requests
