"""`parscale generate`."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parscale.cli.options import Adaptive, Checkpoint, Device, Seed, Streams
from parscale.cli.output import opened, quiet_libraries
from parscale.terminal.text import raw_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


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
    from parscale.checkpoints.texts.token_ids import require_known, require_text, vocabulary_of

    quiet_libraries()
    prompt = require_text("The prompt", prompt).removeprefix("\ufeff")  # a byte-order mark, from a file
    model, tokenizer = opened(checkpoint, streams, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("The prompt has no tokens; give --prompt some text.")
    require_known(inputs["input_ids"][0].tolist(), vocabulary_of(model))
    _check_positions(model, inputs["input_ids"].shape[1], max_new_tokens)

    from transformers import set_seed

    from parscale import methods

    if seed is not None:
        set_seed(seed)
    write = model.generate if adaptive is None else functools.partial(methods.generate, model, adaptive=adaptive)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    write(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],  # passed by name: some tokenizers return more than every model takes
        **sampling,
        **_without_state(model),
        num_beams=1,  # text is printed while it is generated, which beams do not allow
        max_new_tokens=max_new_tokens,
        streamer=_streamer(tokenizer),
    )
    if adaptive is not None:
        typer.echo(f"Streams for a token on average: {model.last_mean_streams:.2f} of {model.num_streams}.", err=True)


def _check_positions(model: PreTrainedModel, length: int, max_new_tokens: int) -> None:
    """Checks that positions suffice for a prompt of `length` tokens and the new ones, but for the last.

    Too few are an error where they are learned, and otherwise a line on standard error.

    Raises:
        ValueError: the model has learned too few.
    """
    from parscale.checkpoints.evaluation.text_loss import text_positions
    from parscale.streams.backbones import has_learned_positions

    positions, _ = text_positions(model)
    most = positions - length + 1  # the last new token is not read
    if max_new_tokens <= most:
        return
    if not has_learned_positions(model):
        typer.echo(
            f"The prompt's {length} tokens and {max_new_tokens} new ones are more than the {positions} positions of "
            "the model (max_position_embeddings): beyond them its text may make no sense.",
            err=True,
        )
        return
    given = f"The prompt has {length} tokens, and the model positions for {positions}"
    if most < 1:
        raise ValueError(f"{given}: shorten the prompt.")
    raise ValueError(f"{given}: --max-new-tokens is {max_new_tokens}, and must be at most {most}.")


def _without_state(model: Any) -> dict[str, bool]:
    """Turns off a recurrent state that continues with one row only, where several streams run (RWKV)."""
    from parscale.streams.backbones import cache_argument

    alone = getattr(model, "num_streams", 1) > 1 and cache_argument(model.parscale.backbone) == "state"
    return {"use_cache": False} if alone else {}


def _streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """Prints each piece of text once it is complete."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            stream = sys.stdout if sys.stdout.isatty() else raw_stream(sys.stdout)
            stream.write(text + ("\n" if stream_end else ""))
            stream.flush()

    return Streamer(tokenizer, skip_special_tokens=True)
