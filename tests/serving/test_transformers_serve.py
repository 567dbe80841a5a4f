"""`transformers serve` on a full folder: a server with OpenAI's protocol, in a process of its own."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from openai import BadRequestError, OpenAI
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import parscale
from parscale.auto import register_architecture
from parscale.checkpoints import small_model_path

pytestmark = pytest.mark.slow

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ("def read_config(path):\n", "def close(self):\n")
QUESTION = [{"role": "user", "content": "How do I open a file?"}]
TOKENS = 24
STARTS_WITHIN, ANSWERS_WITHIN = 180, 60  # seconds


@dataclasses.dataclass
class Server:
    """A running server.

    Attributes:
        url: without a path.
        model: the name by which requests ask for the model.
        log: the file with all that the server printed.
    """

    url: str
    model: str
    log: Path

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=ANSWERS_WITHIN)

    def post(self, path: str, content: dict | bytes) -> tuple[int, str]:
        """The status and the text of an answer."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWERS_WITHIN) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def complete(self, prompt: str = PROMPTS[0]) -> str:
        with self.client() as client:
            answer = client.completions.create(model=self.model, prompt=prompt, max_tokens=TOKENS, temperature=0)
        return answer.choices[0].text


@contextlib.contextmanager
def serving(model: Path, work: Path, *options: str) -> Iterator[Server]:
    """A server of `model`, which has ended when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--trust-remote-code", *options]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", str(model)]
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home"), "CUDA_VISIBLE_DEVICES": ""}
    log = work / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=work, env=os.environ | settings, stdout=output, stderr=output, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(process, f"{url}/health", log)
            yield Server(url, str(model), log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=10)


def wait_for(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(f"The server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The small model with three streams, in float32, and a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("serving") / "parallel"
    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(small_model_path(), dtype=torch.float32)
    parscale.wrap(model, 3, prefix_length=12, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    with serving(folder, tmp_path_factory.mktemp("server")) as running:
        yield running


@dataclasses.dataclass
class Expected:
    """What `generate` gives: the text, and the numbers of the user's tokens and of new ones."""

    text: str
    prompt_tokens: int
    new_tokens: int


@pytest.fixture(scope="module")
def generated(folder):
    """A function from a prompt to what `load(folder).generate` makes of it."""
    model, tokenizer = parscale.load(folder), AutoTokenizer.from_pretrained(folder)

    def generate(prompt: str | list[dict[str, str]], streams: str | None = "default") -> Expected:
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
        with model.use_streams(streams):
            output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        count = inputs["input_ids"].shape[1]
        text = tokenizer.decode(output[0, count:], skip_special_tokens=True)
        return Expected(text, count, output.shape[1] - count)

    return generate


def counts(usage: object) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


# -- answers


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_that_of_generate(server, generated, prompt):
    """To the letter, with the user's tokens counted and no prefix; and it is not the plain backbone's."""
    expected = generated(prompt)
    with server.client() as client:
        answer = client.completions.create(model=server.model, prompt=prompt, max_tokens=TOKENS, temperature=0)
    assert answer.choices[0].text == expected.text != generated(prompt, streams=None).text
    total = expected.prompt_tokens + expected.new_tokens
    assert counts(answer.usage) == (expected.prompt_tokens, expected.new_tokens, total)


def test_a_chat_answer_is_that_of_generate(server, generated):
    expected = generated(QUESTION)
    with server.client() as client:
        answer = client.chat.completions.create(
            model=server.model,
            messages=QUESTION,
            max_tokens=TOKENS,
            temperature=0,  # its newer name is refused by 5.16
        )
    assert answer.choices[0].message.content == expected.text.strip()  # the server's reading of Qwen's chat format
    total = expected.prompt_tokens + expected.new_tokens
    assert counts(answer.usage) == (expected.prompt_tokens, expected.new_tokens, total)


def test_streamed_pieces_join_to_the_same_text(server, generated):
    expected, asked = generated(PROMPTS[0]), generated(QUESTION)
    with server.client() as client:
        pieces = list(
            client.completions.create(
                model=server.model, prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0, stream=True
            )
        )
        chat = list(
            client.chat.completions.create(
                model=server.model, messages=QUESTION, max_tokens=TOKENS, temperature=0, stream=True
            )
        )
    assert len(pieces) > TOKENS / 2
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text
    assert counts(pieces[-1].usage)[:2] == (expected.prompt_tokens, expected.new_tokens)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert "".join(piece.choices[0].delta.content or "" for piece in chat) == asked.text
    assert counts(chat[-1].usage)[:2] == (asked.prompt_tokens, asked.new_tokens)


def test_several_clients_at_once_get_their_own_answers(server, generated):
    expected = [generated(prompt).text for prompt in PROMPTS] * 3
    with ThreadPoolExecutor(len(expected)) as clients:
        assert list(clients.map(server.complete, PROMPTS * 3)) == expected


# -- faults


def test_bad_requests_are_refused_and_the_server_goes_on(server, generated):
    with server.client() as client, pytest.raises(BadRequestError) as refused:
        client.completions.create(model="another", prompt=PROMPTS[0])
    assert "requested 'another'" in refused.value.response.text
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert server.post(path, b'{"model": ')[0] == 422
        assert server.post(path, {"model": server.model, "no_such_field": 1})[0] == 422
    assert server.post("/v1/completions", {"model": server.model, "prompt": 1})[0] == 400
    assert server.complete() == generated(PROMPTS[0]).text


def test_the_server_survives_requests_that_it_does_not_expect(server, generated):
    """transformers' server answers some bad requests with an internal error; the next one is answered all the same."""
    for path, fields in (
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {}),
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1}),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1, "stream": True}),
    ):
        status, text = server.post(path, {"model": server.model} | fields)
        assert status >= 400 or '"error"' in text
        assert server.complete() == generated(PROMPTS[0]).text


def test_a_client_that_leaves_does_not_hold_up_the_next(server, generated):
    """Requests wait for each other: an answer of half a million tokens would outlast every time-out here."""
    endless = {"generation_config": '{"eos_token_id": null, "pad_token_id": 0}'}  # no token ends it
    with server.client() as client:
        stream = client.completions.create(
            model=server.model, prompt=PROMPTS[0], max_tokens=500_000, temperature=0, stream=True, extra_body=endless
        )
        assert next(iter(stream)).choices[0].text
        stream.close()
    assert server.complete() == generated(PROMPTS[0]).text


@pytest.mark.nightly  # a second server; by day the model itself refuses, see test_backends.py
def test_continuous_batching_is_refused(folder, tmp_path):
    """Each request fails, the log says why, and nothing else stops."""
    with serving(folder, tmp_path, "--continuous-batching") as server:
        for stream in (False, True):
            request = {"model": server.model, "prompt": PROMPTS[0], "max_tokens": 4, "stream": stream}
            assert server.post("/v1/completions", request)[0] == 500
        with urllib.request.urlopen(f"{server.url}/health", timeout=ANSWERS_WITHIN) as answer:
            assert answer.status == 200
    assert "ValueError: Continuous batching and its paged attention do not run with streams" in server.log.read_text()


# -- how the server finds the class


def test_transformers_has_the_class_that_a_folder_names(folder):
    name = AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder)
    assert (name, type(model).__name__, model.num_streams) == ("Qwen2ParScaleForCausalLM", "Qwen2ForCausalLM", 3)


def test_classes_are_named_in_each_copy_of_transformers(monkeypatch):
    """Importing its processors makes transformers' package anew; the server's module keeps the first."""
    of_server, imported = (ModuleType("transformers") for _ in range(2))
    taken = imported.TinyParScaleForCausalLM = object()
    manager = ModuleType("transformers.cli.serving.model_manager")
    manager.transformers = of_server
    monkeypatch.setitem(sys.modules, manager.__name__, manager)
    monkeypatch.setitem(sys.modules, "transformers", imported)
    monkeypatch.setitem(vars(transformers), "TinyParScaleForCausalLM", None)
    for name in ("TinyParScaleForCausalLM", "TinyForCausalLM", ["TinyParScaleModel"], None):
        register_architecture(name)
    assert of_server.TinyParScaleForCausalLM is parscale.auto.ParScaleForCausalLM
    assert imported.TinyParScaleForCausalLM is taken
    assert not hasattr(of_server, "TinyForCausalLM")
