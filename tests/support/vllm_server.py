"""A local server that responds as vLLM and SGLang do, with a tiny model, and fails on request."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch


@torch.no_grad()
def prompt_logprobs(model, ids, k):
    """`[None, {id: Logprob}, ...]`: the label first, then the k best, in vLLM's order."""
    logps = model(torch.tensor(ids)[None]).logits[0].float().log_softmax(-1)
    positions = [None]
    for row, token in zip(logps[:-1], ids[1:], strict=True):
        values, best = row.topk(k)
        listed = [(token, row[token].item(), int((row >= row[token]).sum()))]
        listed += [(i, v, rank) for rank, (i, v) in enumerate(zip(best.tolist(), values.tolist(), strict=True), 1)]
        positions.append({i: SimpleNamespace(logprob=v, rank=rank, decoded_token="x") for i, v, rank in listed})
    return positions


def flat(entries, ids):
    """The same as vLLM's `FlatLogprobs`: the label comes first, and again if it is one of the k best."""
    out = SimpleNamespace(start_indices=[], end_indices=[], token_ids=[], logprobs=[])
    for entry, token in zip(entries, ids, strict=True):
        out.start_indices.append(len(out.token_ids))
        if entry is not None:
            ranked = sorted((v.rank, i) for i, v in entry.items())
            k = len(entry) - (ranked[-1][1] == token and ranked[-1][0] > len(entry) - 1)
            best = [i for _, i in ranked[:k]]
            out.token_ids += [token, *best]
            out.logprobs += [entry[i].logprob for i in (token, *best)]
        out.end_indices.append(len(out.token_ids))
    return out


def as_json(entries):
    """The JSON of vLLM's server: ids are strings, and -inf is -9999.0."""
    return [
        entry and {str(i): {**vars(v), "logprob": max(v.logprob, -9999.0)} for i, v in entry.items()}
        for entry in entries
    ]


def as_sglang(entries, ids, start, k):
    """SGLang's `meta_info`: triples from position `start` on, the first without a value."""
    tokens, best = [[None, ids[start], None]], [None]
    for token, entry in zip(ids[start + 1 :], entries[start + 1 :], strict=True):
        tokens.append([entry[token].logprob, token, None])
        ranked = sorted(entry, key=lambda i: entry[i].rank)[:k]
        best.append([[entry[i].logprob, i, None] for i in ranked])
    return {"input_token_logprobs": tokens} | ({"input_top_logprobs": best} if k else {})


def stale(entries, previous, cached):
    """What vLLM issue 42019 makes of the first `cached` positions: the values of the previous request."""
    out = list(entries)
    for at in range(1, min(cached, len(previous))):
        ours = sorted(entries[at].items(), key=lambda item: item[1].rank)
        values = sorted((v.logprob for v in previous[at].values()), reverse=True)
        values += values[-1:] * (len(ours) - len(values))
        out[at] = {i: SimpleNamespace(**{**vars(v), "logprob": x}) for (i, v), x in zip(ours, values, strict=False)}
    return out


def common_prefix(ids, others):
    return next((n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))


class VLLM(ThreadingHTTPServer):
    """Each request takes one of the `faults`: a function of the handler that returns whether it has responded.
    `served` are the prompts with a complete response. With `prefix_cache`, a prefix that was served before with the
    same salt (with any, if it is "unsalted") has `stale` values."""

    daemon_threads = True

    def __init__(self, model, models=("teacher",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.models = model, models
        self.faults, self.served, self.requests = [], [], []
        self.prefix_cache, self.cached, self.previous = None, [], []
        self.change = lambda document: document
        self.lock = threading.Lock()
        self.most, self.now = 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def entries(self, ids, k, salt):
        entries = prompt_logprobs(self.model, ids, k)
        if self.prefix_cache is None:
            return entries
        same = [other for other_salt, other in self.cached if self.prefix_cache == "unsalted" or other_salt == salt]
        cached = max((common_prefix(ids, other) for other in same), default=0)
        previous, self.previous = self.previous, entries
        self.cached.append((salt, ids))
        return stale(entries, previous, cached)

    def handle_error(self, request, client_address):
        """Ignore broken connections, which the tests cause."""


@contextmanager
def serving(model, **options):
    server = VLLM(model, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: VLLM

    def log_message(self, *args):
        pass

    def reply(self, document, status=200, headers=(), cut=0):
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        if cut:
            self.close_connection = True

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply({"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            fault = server.faults.pop(0) if server.faults else None
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            if fault is not None and fault(self):
                return
            sglang = self.path == "/generate"
            ids, k = (
                body["input_ids" if sglang else "prompt"],
                body["top_logprobs_num" if sglang else "prompt_logprobs"],
            )
            with server.lock:
                entries = server.entries(ids, k, body.get("cache_salt"))
            if sglang:
                document = {"text": "x", "meta_info": as_sglang(entries, ids, body["logprob_start_len"], k)}
            else:
                document = {"choices": [{"index": 0, "text": " x", "prompt_logprobs": as_json(entries)}]}
            with server.lock:
                server.served.append(tuple(ids))
            self.reply(server.change(document))
        finally:
            with server.lock:
                server.now -= 1


def drop(handler):
    handler.close_connection = True
    handler.connection.close()
    return True


def status(code, headers=()):
    def fault(handler):
        handler.reply({"error": {"message": "requested fault"}}, code, headers)
        return True

    return fault


def half_a_body(handler):
    handler.reply({"choices": [{"prompt_logprobs": [None] * 50}]}, cut=100)
    return True


def one_token_less(handler):
    handler.reply({"choices": [{"prompt_logprobs": [None]}]})
    return True


def slow(handler):
    time.sleep(0.1)


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 2**20)
