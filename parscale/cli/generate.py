"""`parscale generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from parscale.cli.options import Adaptive, Checkpoint, Device, Seed, Streams
from parscale.cli.output import quiet_libraries, waiting
from parscale.terminal.text import raw_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer


COLDEST = 1e-3
"""The lowest temperature besides 0: far below it, logits divided by it are no numbers of half precision any more."""


def _temperature(value: float) -> float:
    if not (value == 0 or COLDEST <= value < float("inf")):
        raise typer.BadParameter(f"{value} is not 0 or a number from {COLDEST} on; 0 takes the likeliest token")
    return value


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=_temperature, help="0 takes the likeliest token each time.")
    ] = 0.0,
    adaptive: Adaptive = None,
    streams: Streams = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Continue a text, and print it while it is generated.

    A file or a pipe gets the text as it is; a terminal is shown control characters as escapes. With --adaptive the last
    line on standard error says how many streams ran for a token on average.
    """
    from parscale.checkpoints.models import open_checkpoint, require_tokenizer
    from parscale.checkpoints.texts.token_ids import require_known, require_text, vocabulary_of

    quiet_libraries()
    prompt = require_text("The prompt", prompt).removeprefix("\ufeff")  # a byte-order mark, from a file
    with waiting(f"Loading {checkpoint}"):
        model, tokenizer = open_checkpoint(checkpoint, streams=streams, device=device)
    tokenizer = require_tokenizer(tokenizer, checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("The prompt has no tokens; give --prompt some text.")
    require_known(inputs["input_ids"][0].tolist(), vocabulary_of(model))

    from transformers import set_seed

    if seed is not None:
        set_seed(seed)
    options = {} if adaptive is None else {"adaptive": adaptive}
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],  # passed by name: some tokenizers return more than every model takes
        **sampling,
        **options,
        max_new_tokens=max_new_tokens,
        streamer=_streamer(tokenizer),
    )
    if adaptive is not None:
        typer.echo(f"Streams for a token on average: {model.last_mean_streams:.2f} of {model.num_streams}.", err=True)


def _streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """Prints each piece of text once it is complete."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            stream = sys.stdout if sys.stdout.isatty() else raw_stream(sys.stdout)
            stream.write(text + ("\n" if stream_end else ""))
            stream.flush()

    return Streamer(tokenizer, skip_special_tokens=True)
