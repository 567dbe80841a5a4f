"""Serve a model with four parallel streams over HTTP, and ask it with OpenAI's client.

Needs `parscale[serve]`, or `parscale[vllm]` for `--engine vllm`. Any full checkpoint goes after `--model`; without one,
the small model that the package carries gets four streams.

    python examples/serve_and_ask.py --model trained --engine vllm --prompt "def fibonacci(n):"
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import wrap
from parscale.checkpoints import small_model_path

ENGINES = {  # what `transformers serve` and `vllm serve` run
    "transformers": ["-m", "transformers.cli.transformers", "serve", "--trust-remote-code"],
    "vllm": ["-m", "vllm.entrypoints.openai.api_server", "--gpu-memory-utilization", "0.5", "--model"],
}


def make_folder(folder: str) -> str:
    """A full checkpoint: the small model with four streams, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(small_model_path())
    wrap(model, num_streams=4, seed=0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_model_path()).save_pretrained(folder)
    return folder


@contextmanager
def serving(engine: str, model: str, log: Path, seconds: float) -> Iterator[str]:
    """The address of a server that has started, and stops when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    command = [sys.executable, "-P", *ENGINES[engine], model, "--host", host, "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + seconds
        while not is_healthy(f"http://{host}:{port}/health"):
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"The server did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield f"http://{host}:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def ask(url: str, model: str, prompt: str, max_tokens: int) -> None:
    """Prints the answer as it comes, and the tokens that were counted."""
    usage = None
    with OpenAI(base_url=url, api_key="none") as client:
        for piece in client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            print("".join(choice.text for choice in piece.choices), end="", flush=True)
            usage = piece.usage or usage
    print(f"\n\n{usage.prompt_tokens} tokens in, {usage.completion_tokens} out")  # no prefix among them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="transformers")
    parser.add_argument("--model", help="a full checkpoint")
    parser.add_argument("--prompt", default="def read_config(path):\n")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--wait", type=float, default=300, help="for the server to start, in seconds")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: the server is stopped
    with tempfile.TemporaryDirectory() as work:
        model = args.model or make_folder(f"{work}/parallel")
        with serving(args.engine, model, Path(work, "server.log"), args.wait) as url:
            print(f"{args.engine} serves {Path(model).name}:\n{args.prompt}", end="")
            ask(url, model, args.prompt, args.max_new_tokens)


if __name__ == "__main__":
    main()
