"""`benchmarks/load.py` against a stand-in server whose delays, token counts and faults are known."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load.py"
FIRST, GAP, PIECES = 0.2, 0.03, 5
WHOLE = FIRST + (PIECES - 1) * GAP
TOKENS_PER_WORD, TOKENS_PER_PIECE = 3, 2


@pytest.fixture(scope="module")
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class StandIn(ThreadingHTTPServer):
    """Streams `PIECES` pieces: the first after `FIRST` seconds, each of the others after `GAP`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[int, str] = {}  # by the number of the request, from 0
        self.bodies: list[tuple[str, dict]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def prompts(self) -> list[str]:
        """Those that were measured."""
        return [body.get("prompt") or body["messages"][0]["content"] for _, body in self.bodies[1:]]


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            fault = self.server.faults.get(len(self.server.bodies))
            self.server.bodies.append((self.path, body))
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            self.answer(body, fault)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def answer(self, body: dict, fault: str | None) -> None:
        self.send_response(500 if fault == "status" else 200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if fault == "status":
            return
        chat = self.path.endswith("/chat/completions")
        if chat:
            self.send({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})  # no text: not a first token
        for piece in range(PIECES):
            time.sleep(FIRST if piece == 0 else GAP)
            if fault == "midway" and piece == 2:
                self.send({"error": "out of memory"})
                return
            self.send({"choices": [{"index": 0} | ({"delta": {"content": "x"}} if chat else {"text": "x"})]})
        words = (body.get("prompt") or body["messages"][0]["content"]).split()
        given, made = len(words) * TOKENS_PER_WORD, PIECES * TOKENS_PER_PIECE
        usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        if fault != "no usage":
            self.send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, piece: dict) -> None:
        self.wfile.write(f"data: {json.dumps({'id': '1', 'object': 'x'} | piece)}\n\n".encode())

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server():
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


# -- figures


def test_times_are_mean_and_quantiles(load):
    """Of 0, 1, ..., 100 the quantile q is q; of two values it lies on the line between them."""
    times = load.Times.of(list(np.random.default_rng(0).permutation(101)))
    assert dataclasses.astuple(times) == (101, 50, 50, 90, 95, 99)
    times = load.Times.of([1.0, 3.0])
    assert dataclasses.astuple(times) == pytest.approx((2, 2, 2, 2.8, 2.9, 2.98))
    assert load.Times.of([]) is None


def test_a_result_counts_what_was_answered(load):
    answers = [
        load.Answer(first=1.0, gaps=[0.5, 1.5], total=3.0, prompt_tokens=10, output_tokens=3),
        load.Answer(first=3.0, gaps=[1.0], total=5.0, prompt_tokens=20, output_tokens=5),
        load.Answer(first=100.0, total=100.0, prompt_tokens=99, output_tokens=99, error="broken"),
        load.Answer(error="broken"),
        load.Answer(error="absent"),
    ]
    result = load.Result.of(answers, seconds=4.0, concurrency=2)
    assert (result.requests, result.done, result.failed) == (5, 2, 3)
    assert result.errors == {"absent": 1, "broken": 2}
    assert (result.output_tokens, result.output_tokens_per_second, result.requests_per_second) == (8, 2.0, 0.5)
    assert (result.mean_prompt_tokens, result.mean_output_tokens) == (15.0, 4.0)
    assert (result.first_token.mean, result.between_tokens.mean, result.whole_answer.mean) == (2.0, 1.0, 4.0)
    assert (result.first_token.count, result.between_tokens.count) == (2, 3)
    nothing = load.Result.of(answers[2:], seconds=4.0, concurrency=2)
    assert (nothing.done, nothing.mean_prompt_tokens, nothing.whole_answer) == (0, None, None)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_delays_are_measured(load, server, api):
    """None is shorter than the server's; eight requests, four at a time, are sooner done than one after another."""
    result = load.measure(server.url, "m", requests=8, concurrency=4, prompt_tokens=30, max_tokens=10, api=api)
    assert (result.requests, result.done, result.failed, result.errors) == (8, 8, 0, {})
    assert (result.mean_prompt_tokens, result.output_tokens) == (30.0, 8 * PIECES * TOKENS_PER_PIECE)
    assert (result.first_token.count, result.between_tokens.count) == (8, 8 * (PIECES - 1))
    assert FIRST <= result.first_token.p50 < 1.5 * FIRST
    assert GAP * 0.9 <= result.between_tokens.mean < 2 * GAP
    assert WHOLE <= result.whole_answer.p50 < 1.5 * WHOLE
    assert 2 * WHOLE <= result.seconds < 6 * WHOLE
    assert result.requests_per_second == 8 / result.seconds
    assert server.most_in_flight == 4


def test_requests_say_what_was_asked_for(load, server):
    load.measure(server.url, "m", requests=2, concurrency=1, prompt_tokens=30, max_tokens=10, ignore_eos=True)
    path, body = server.bodies[1]
    assert path == "/v1/completions"
    assert body["ignore_eos"] is True
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 10, 0, True)
    assert body["stream_options"] == {"include_usage": True}
    assert len(server.bodies) == 1 + 2


def test_prompts_share_no_beginning_unless_asked(load, server):
    for shared, expected in ((False, 8), (True, 1)):
        server.bodies.clear()
        load.measure(server.url, "m", requests=8, concurrency=8, prompt_tokens=60, shared_prefix=shared, seed=1)
        words = [prompt.split() for prompt in server.prompts()]
        assert {len(prompt) for prompt in words} == {60 // TOKENS_PER_WORD}
        assert len({tuple(prompt[:10]) for prompt in words}) == expected
        assert len({tuple(prompt[10:]) for prompt in words}) == 8
    assert load.make_prompts(3, 9, seed=1) == load.make_prompts(3, 9, seed=1) != load.make_prompts(3, 9, seed=2)


def test_faults_are_counted(load, server):
    """An error, a stream that breaks off, and one without a usage; the first request is not measured."""
    server.faults = {2: "status", 3: "midway", 5: "no usage", 6: "status"}
    result = load.measure(server.url, "m", requests=8, concurrency=2, prompt_tokens=30, max_tokens=10)
    assert (result.done, result.failed) == (4, 4)
    assert sorted(result.errors.values()) == [1, 1, 2]
    assert any("out of memory" in message for message in result.errors)
    assert "The stream ended without a usage." in result.errors
    assert result.output_tokens == 4 * PIECES * TOKENS_PER_PIECE
    server.bodies.clear()
    server.faults = {0: "status"}
    with pytest.raises(ConnectionError, match="does not answer: InternalServerError"):
        load.measure(server.url, "m")
    assert len(server.bodies) == 1


# -- bounds


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/v1",
        "http://192.168.0.1:8000/v1",
        "http://0.0.0.0:8000/v1",
        "http://127.0.0.1.example.com/v1",
        "http://127.0.0.1:8000@example.com/v1",
        "ftp://127.0.0.1/v1",
        "127.0.0.1:8000",
    ],
)
def test_other_machines_are_refused(load, url):
    with pytest.raises(ValueError, match="a server on this machine only"):
        load.measure(url, "m")


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://127.0.0.2/v1", "http://[::1]:8000/v1"])
def test_this_machine_is_allowed(load, url):
    load.check(url, requests=1, concurrency=1, prompt_tokens=1, max_tokens=1)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"requests": 0}, "--requests is 1 to 10,000, got 0"),
        ({"requests": 10_001}, "--requests is 1 to 10,000, got 10001"),
        ({"requests": 4, "concurrency": 5}, "--concurrency is 1 to the number of requests, 4, got 5"),
        ({"concurrency": 0}, "--concurrency"),
        ({"prompt_tokens": 0}, "--prompt-tokens is 1 to"),
        ({"max_tokens": -1}, "--max-tokens is 1 to"),
        ({"api": "responses"}, '"completions" or "chat"'),
    ],
)
def test_numbers_are_bounded(load, server, numbers, message):
    with pytest.raises(ValueError, match=message):
        load.measure(server.url, "m", **numbers)
    assert server.bodies == []


# -- the script


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_script_prints_a_table_and_writes_json(server, tmp_path):
    server.faults = {1: "status"}
    numbers = ["--requests", 3, "--concurrency", 3, "--prompt-tokens", 30, "--max-tokens", 10]
    finished = run("--url", server.url, "--model", "m", *numbers, "--output", tmp_path / "load.json")
    assert finished.returncode == 1  # a request failed
    assert "2 done, 1 failed" in finished.stdout
    assert "30.0 tokens in and 10.0 out" in finished.stdout
    written = json.loads((tmp_path / "load.json").read_text())
    assert (written["done"], written["asked"]["requests"], written["first_token"]["count"]) == (2, 3, 2)


def test_the_script_says_what_is_wrong():
    finished = run("--url", "http://example.com/v1", "--model", "m")
    assert finished.returncode == 2
    assert "a server on this machine only" in finished.stderr
    finished = run("--url", "http://127.0.0.1:9/v1", "--model", "m")
    assert finished.returncode == 2
    assert "does not answer: APIConnectionError" in finished.stderr
