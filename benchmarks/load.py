"""Load on a server that speaks OpenAI's protocol: throughput, and the times that each request waited.

Requests are streamed, `--concurrency` of them at any time, to a server on this machine (vLLM's, transformers'). Prompts
are random words, so that nothing that a server keeps of one prompt helps with the next, unless `--shared-prefix` gives
all of them the same beginning. Tokens are counted by the server's usage: a first request, which is not measured, tells
how many words make a prompt of `--prompt-tokens`. A piece of a stream counts as a token in the times between tokens: a
server that sends several at once shows fewer and longer gaps.

    vllm serve FOLDER --port 8000 &
    python benchmarks/load.py --url http://127.0.0.1:8000/v1 --model FOLDER --requests 64 --concurrency 8 --ignore-eos
    python benchmarks/load.py --url http://127.0.0.1:8000/v1 --model FOLDER --api chat --output load.json
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

MOST_REQUESTS = 10_000
MOST_TOKENS = 1_000_000  # of a prompt, or of an answer
QUANTILES = (50, 90, 95, 99)
VOCABULARY = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face level office door health person art war history party result change morning reason research "
    "girl guy moment air teacher force education"
)


@dataclass
class Answer:
    """What one request got; times in seconds.

    Attributes:
        first: from the request to the first piece of text; None if there was none.
        gaps: between one piece and the next.
        total: from the request to the end of the stream.
        prompt_tokens: by the server's usage.
        output_tokens: by the server's usage.
        error: what went wrong, or None.
    """

    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    total: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@dataclass
class Times:
    """Of a sample, in seconds: its mean, and quantiles between which `numpy.percentile` interpolates linearly."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Times | None:
        """None for an empty sample."""
        if not sample:
            return None
        quantiles = np.percentile(sample, QUANTILES, method="linear")
        return cls(len(sample), float(np.mean(sample)), *map(float, quantiles))


@dataclass
class Result:
    """A run. Rates count the requests that were answered, over the time from the first request to the last answer."""

    requests: int
    concurrency: int
    done: int
    failed: int
    errors: dict[str, int]
    seconds: float
    requests_per_second: float
    output_tokens: int
    output_tokens_per_second: float
    mean_prompt_tokens: float | None
    mean_output_tokens: float | None
    first_token: Times | None
    between_tokens: Times | None
    whole_answer: Times | None

    @classmethod
    def of(cls, answers: Sequence[Answer], seconds: float, concurrency: int) -> Result:
        """Puts the answers of a run together.

        Args:
            answers: of all requests.
            seconds: from the first request to the last answer.
            concurrency: how many there were at any time.
        """
        done = [answer for answer in answers if answer.error is None]
        messages = [answer.error for answer in answers if answer.error is not None]
        output_tokens = sum(answer.output_tokens for answer in done)
        return cls(
            requests=len(answers),
            concurrency=concurrency,
            done=len(done),
            failed=len(messages),
            errors={message: messages.count(message) for message in sorted(set(messages))},
            seconds=seconds,
            requests_per_second=len(done) / seconds,
            output_tokens=output_tokens,
            output_tokens_per_second=output_tokens / seconds,
            mean_prompt_tokens=float(np.mean([answer.prompt_tokens for answer in done])) if done else None,
            mean_output_tokens=output_tokens / len(done) if done else None,
            first_token=Times.of([answer.first for answer in done if answer.first is not None]),
            between_tokens=Times.of([gap for answer in done for gap in answer.gaps]),
            whole_answer=Times.of([answer.total for answer in done]),
        )


def make_prompts(count: int, words: int, *, shared_prefix: bool = False, seed: int = 0) -> list[str]:
    """Prompts of random words, the same for the same seed.

    Args:
        count: of prompts.
        words: in each.
        shared_prefix: the first half of the words is the same in all.
        seed: of the draw.
    """
    draw, vocabulary = random.Random(seed), VOCABULARY.split()
    shared = draw.choices(vocabulary, k=words // 2 if shared_prefix else 0)
    return [" ".join(shared + draw.choices(vocabulary, k=words - len(shared))) for _ in range(count)]


def check(url: str, requests: int, concurrency: int, prompt_tokens: int, max_tokens: int) -> None:
    """Holds a run within bounds, and on this machine.

    Raises:
        ValueError: with what was given and what is allowed.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not _is_loopback(parts.hostname or ""):
        raise ValueError(
            f"--url {url}: load goes to a server on this machine only, as http://127.0.0.1:PORT/v1 or "
            "http://localhost:PORT/v1."
        )
    if not 1 <= requests <= MOST_REQUESTS:
        raise ValueError(f"--requests is 1 to {MOST_REQUESTS:,}, got {requests}.")
    if not 1 <= concurrency <= requests:
        raise ValueError(f"--concurrency is 1 to the number of requests, {requests}, got {concurrency}.")
    for name, value in (("--prompt-tokens", prompt_tokens), ("--max-tokens", max_tokens)):
        if not 1 <= value <= MOST_TOKENS:
            raise ValueError(f"{name} is 1 to {MOST_TOKENS:,}, got {value}.")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def measure(
    url: str,
    model: str,
    *,
    requests: int = 64,
    concurrency: int = 8,
    prompt_tokens: int = 128,
    max_tokens: int = 64,
    api: str = "completions",
    ignore_eos: bool = False,
    shared_prefix: bool = False,
    seed: int = 0,
    timeout: float = 600.0,
    progress: bool = False,
) -> Result:
    """Loads a server and measures it.

    Args:
        url: as `http://127.0.0.1:8000/v1`; another machine's is refused.
        model: its name, as the server knows it.
        requests: how many, 10,000 at most.
        concurrency: how many at any time.
        prompt_tokens: of each prompt, nearly; the result says how many there were.
        max_tokens: of each answer.
        api: `"completions"` or `"chat"`.
        ignore_eos: answers do not end before `max_tokens` (vLLM knows this).
        shared_prefix: all prompts begin with the same half.
        seed: of the prompts.
        timeout: of a request, in seconds.
        progress: whether to show a bar on standard error.

    Raises:
        ValueError: a number out of range, another machine's address or an unknown API.
        ConnectionError: the first request, which is not measured, was not answered.
    """
    check(url, requests, concurrency, prompt_tokens, max_tokens)
    if api not in ("completions", "chat"):
        raise ValueError(f'api is "completions" or "chat", got {api!r}.')
    fields: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0.0}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if ignore_eos:
        fields["extra_body"] = {"ignore_eos": True}
    connection = Connection(url, api, fields, timeout, concurrency)

    async def run() -> tuple[list[Answer], float]:
        async with connection.client:
            words = round(prompt_tokens / await _tokens_per_word(connection))
            prompts = make_prompts(requests, max(1, words), shared_prefix=shared_prefix, seed=seed)
            return await _ask_all(connection, prompts, progress)

    return Result.of(*asyncio.run(run()), concurrency)


class Connection:
    """A server, and what every request to it says.

    Args:
        url: of the server.
        api: `"completions"` or `"chat"`.
        fields: of the requests, beside the prompt.
        timeout: of a request, in seconds.
        concurrency: requests at any time.
    """

    def __init__(self, url: str, api: str, fields: dict[str, Any], timeout: float, concurrency: int) -> None:
        self.client = AsyncOpenAI(
            base_url=url,
            api_key="none",
            max_retries=0,
            timeout=timeout,
            # Straight to the server: through no proxy, and to no other machine that it might point to.
            http_client=DefaultAsyncHttpxClient(trust_env=False, follow_redirects=False),
            # A server may close a connection after an error, and the next request on it would fail too.
            default_headers={"Connection": "close"},
        )
        self.api = api
        self.fields = fields
        self.concurrency = concurrency


async def _tokens_per_word(connection: Connection) -> float:
    """As the server counts them in all words, each once; this request also wakes the server up."""
    answer = await _ask(connection, VOCABULARY)
    if answer.error is not None:
        raise ConnectionError(f"{connection.client.base_url} does not answer: {answer.error}")
    return max(1, answer.prompt_tokens) / len(VOCABULARY.split())


async def _ask_all(connection: Connection, prompts: list[str], progress: bool) -> tuple[list[Answer], float]:
    """All answers, and the seconds they took together."""
    waiting = iter(prompts)
    answers: list[Answer] = []
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("requests", total=len(prompts))

        async def work() -> None:
            for prompt in waiting:
                answers.append(await _ask(connection, prompt))
                bar.advance(task)

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(connection.concurrency)))
        return answers, time.perf_counter() - start


async def _ask(connection: Connection, prompt: str) -> Answer:
    """One request; whatever it meets is in its answer."""
    client, api, fields = connection.client, connection.api, connection.fields
    answer = Answer()
    usage: Any = None
    start = last = time.perf_counter()
    try:
        if api == "chat":
            stream = await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **fields)
        else:
            stream = await client.completions.create(prompt=prompt, **fields)
        async with stream:
            async for piece in stream:
                usage = piece.usage or usage
                if not piece.choices or not _text(api, piece.choices[0]):
                    continue
                now = time.perf_counter()
                if answer.first is None:
                    answer.first = now - start
                else:
                    answer.gaps.append(now - last)
                last = now
    except Exception as error:  # openai's, or the HTTP client's below it: it is counted, and the others go on
        answer.error = f"{type(error).__name__}: {getattr(error, 'body', None) or error}"  # the body says more
    answer.total = time.perf_counter() - start
    if answer.error is None and usage is None:
        answer.error = "The stream ended without a usage."
    if usage is not None:
        answer.prompt_tokens, answer.output_tokens = usage.prompt_tokens, usage.completion_tokens
    return answer


def _text(api: str, choice: Any) -> str:
    return (choice.delta.content if api == "chat" else choice.text) or ""


def table(result: Result) -> Table:
    """The times, in milliseconds."""
    shown = Table(title=f"{result.requests} requests, {result.concurrency} at a time", title_justify="left")
    shown.add_column("milliseconds")
    for name in ("mean", *(f"p{quantile}" for quantile in QUANTILES)):
        shown.add_column(name, justify="right")
    for name, times in (
        ("to the first token", result.first_token),
        ("between tokens", result.between_tokens),
        ("whole answer", result.whole_answer),
    ):
        if times is not None:
            figures = (times.mean, times.p50, times.p90, times.p95, times.p99)
            shown.add_row(name, *(f"{figure * 1000:,.1f}" for figure in figures))
    return shown


def report(result: Result, console: Console) -> None:
    """Prints the result for people."""
    console.print(table(result))
    console.print(f"{result.done} done, {result.failed} failed in {result.seconds:.2f} s", highlight=False)
    if result.done:
        console.print(
            f"{result.output_tokens_per_second:.1f} output tokens/s, {result.requests_per_second:.2f} requests/s; "
            f"{result.mean_prompt_tokens:.1f} tokens in and {result.mean_output_tokens:.1f} out, on average",
            highlight=False,
        )
    for message, count in result.errors.items():
        console.print(f"{count} x {message}", highlight=False, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of a server on this machine")
    parser.add_argument("--model", required=True, help="its name, as the server knows it")
    parser.add_argument("--requests", type=int, default=64, help=f"at most {MOST_REQUESTS:,}")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at any time")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each prompt, nearly")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--api", choices=("completions", "chat"), default="completions")
    parser.add_argument("--ignore-eos", action="store_true", help="every answer has --max-tokens (vLLM)")
    parser.add_argument("--shared-prefix", action="store_true", help="the first half of all prompts is the same")
    parser.add_argument("--timeout", type=float, default=600.0, help="of a request, in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name != "output"}
    try:
        result = measure(**options, progress=sys.stderr.isatty())
    except (ValueError, ConnectionError) as error:
        parser.error(str(error))
    report(result, Console())
    if args.output is not None:
        args.output.write_text(json.dumps({"asked": options, **asdict(result)}, indent=1) + "\n")
    if result.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
