"""Chats as token ids by the tokenizer's chat template, and which of them are the assistant's: those are learned.

A template with `{% generation %}` marks says so itself. Without them each turn of the assistant's begins where the chat
before it ends, with the prompt to generate, and ends where the chat with it ends. Some templates write an earlier turn
otherwise once more follows, such as without its thoughts: there each turn is learned behind the chat as it was then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from parscale.checkpoints.texts.chats import ASSISTANT
from parscale.checkpoints.texts.documents import Chat, Completion
from parscale.checkpoints.texts.files import first_line
from parscale.checkpoints.texts.token_ids import encode
from parscale.compat.chat_templates import dated

DAY = date(2024, 7, 26)
"""What templates that write the date of today write: a run that goes on tomorrow has to read the same tokens.

The day that Llama's templates write where they know none.
"""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def as_text(name: str, example: str | Completion | Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """An example as the text that a model reads; a chat by the template of its tokenizer.

    Raises:
        ValueError: as in `encode_chat`.
    """
    if isinstance(example, str):
        return example
    if isinstance(example, Completion):
        return example.prompt + example.completion
    return str(tokenizer.decode(list(encode_chat(name, example, tokenizer))[-1].ids))


@dataclass(frozen=True)
class MaskedTokens:
    """Token ids of a document, and which of them are learned.

    Attributes:
        ids: all of them.
        loss_mask: for each, whether it is learned.
    """

    ids: list[int]
    loss_mask: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


def encode_completion(name: str, text: Completion, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """A prompt and its completion as one text, and at which token the completion begins.

    Args:
        name: as errors say it.
        text: both.
        tokenizer: of the model.

    Raises:
        ValueError: the text holds half a character.
    """
    prompt, ids = encode([(name, text.prompt), (name, text.prompt + text.completion)], tokenizer)
    return ids, _in_common(prompt, ids)


def encode_chat(name: str, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Iterator[MaskedTokens]:
    """A chat as one document, or as one for each turn of the assistant's where the template asks for that.

    Args:
        name: as errors say it.
        chat: to encode.
        tokenizer: of the model, with a chat template.

    Raises:
        ValueError: there is no template, it refuses the messages, or it shows none of the assistant's.
    """
    render = _Renderer(name, chat, tokenizer)
    learned = render.by_marks() or render.by_turns()
    documents = [learned] if learned is not None else [render.turn(number) for number in render.turns]
    for document in documents:
        if not any(document.loss_mask):
            raise ValueError(f"{name}: the chat template writes nothing of what the {ASSISTANT} says.")
        yield document


class _Renderer:
    """A chat's messages through a template."""

    def __init__(self, name: str, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.chat, self.tokenizer = name, chat, tokenizer
        self.messages = [*chat.messages]
        self.turns = [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == ASSISTANT and number >= chat.learned_from
        ]
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{name} is a chat, and the tokenizer has no chat template; put a file chat_template.jinja beside the "
                "checkpoint's tokenizer, or train on text."
            )

    def by_marks(self) -> MaskedTokens | None:
        """What the template marks as generated, if it marks anything and the tokenizer can tell the places."""
        if not self.tokenizer.is_fast:
            return None
        tools: Any = self.chat.tools
        if not _GENERATION.search(self.tokenizer.get_chat_template(tools=tools)):
            return None
        encoded = self._apply(self.messages, return_assistant_tokens_mask=True)
        ids, start = encoded["input_ids"], 0
        if self.chat.learned_from:
            start = _in_common(self._ids(self.chat.learned_from, prompts=True), ids)
        loss_mask = [bool(mark) and index >= start for index, mark in enumerate(encoded["assistant_masks"])]
        return MaskedTokens(ids, loss_mask)

    def by_turns(self) -> MaskedTokens | None:
        """What each turn adds to the chat before it, or None if the template changes a turn that is over."""
        ids = self._ids(len(self.messages))
        loss_mask = [False] * len(ids)
        for number in self.turns:
            through = self._ids(number + 1)
            if _in_common(through, ids) < len(through):
                return None
            for index in range(self._start(number, ids), len(through)):
                loss_mask[index] = True
        return MaskedTokens(ids, loss_mask)

    def turn(self, number: int) -> MaskedTokens:
        """The chat up to a turn of the assistant's, which alone is learned."""
        ids = self._ids(number + 1)
        return learned_from(self._start(number, ids), ids)

    def _start(self, number: int, ids: Sequence[int]) -> int:
        return _in_common(self._ids(number, prompts=True), ids) if number else 0

    def _ids(self, count: int, *, prompts: bool = False) -> list[int]:
        """The first messages, also with the prompt to generate the next one."""
        ids: list[int] = self._apply(self.messages[:count], add_generation_prompt=prompts)["input_ids"]
        return ids

    def _apply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        given: dict[str, Any] = {"tools": self.chat.tools, **self.chat.template_options, **options}
        try:
            with dated(DAY):
                return self.tokenizer.apply_chat_template([*messages], return_dict=True, **given)  # type: ignore[arg-type]
        except Exception as error:  # of Jinja, or whatever a template does with a message that it did not expect
            raise ValueError(f"{self.name}: the chat template refuses these messages: {first_line(error)}") from error


def learned_from(start: int, ids: list[int]) -> MaskedTokens:
    """Token ids, which are learned from a position on.

    Args:
        start: the position.
        ids: all of them.
    """
    return MaskedTokens(ids, [index >= start for index in range(len(ids))])


def _in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many token ids two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
