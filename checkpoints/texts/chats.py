"""Chats in rows of data: `messages`, or `prompt` and `completion`, checked before a chat template sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from parscale.checkpoints.texts.documents import Chat, Completion
from parscale.checkpoints.texts.token_ids import require_text

MESSAGES, PROMPT, COMPLETION, TOOLS, OPTIONS = "messages", "prompt", "completion", "tools", "chat_template_kwargs"
COLUMNS = (MESSAGES, PROMPT, COMPLETION, TOOLS, OPTIONS)
ASSISTANT = "assistant"


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row has the columns of a chat, or of a prompt and its completion."""
    return MESSAGES in row or (PROMPT in row and COMPLETION in row)


def holds_chat(row: Mapping[str, Any]) -> bool:
    """Whether these columns hold something; tables have them in all rows."""
    return row.get(MESSAGES) is not None or (row.get(PROMPT) is not None and row.get(COMPLETION) is not None)


def chat_of(where: str, row: Mapping[str, Any]) -> Chat | Completion:
    """A row's messages, or its prompt and completion, each a text or messages.

    Args:
        where: what an error names, such as `"a.jsonl, line 3"`.
        row: for which `is_chat` holds.

    Raises:
        ValueError: a message has no role or content, none is the assistant's, or two columns do not fit.
    """
    if row.get(MESSAGES) is not None:
        messages = _messages(where, MESSAGES, row[MESSAGES])
        return _checked(where, MESSAGES, messages, 0, row)
    prompt, completion = row.get(PROMPT), row.get(COMPLETION)
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, text in ((PROMPT, prompt), (COMPLETION, completion)):
            require_text(f"{where}, {name}", text)
        if not completion:
            raise ValueError(f"{where}: {COMPLETION} is empty, so that nothing of the row would be learned.")
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError(
            f"{where}: {PROMPT} is a {type(prompt).__name__} and {COMPLETION} a {type(completion).__name__}; make both "
            "texts, or both lists of messages."
        )
    begun = _messages(where, PROMPT, prompt)
    return _checked(where, COMPLETION, [*begun, *_messages(where, COMPLETION, completion)], len(begun), row)


def _checked(
    where: str, column: str, messages: list[dict[str, Any]], learned_from: int, row: Mapping[str, Any]
) -> Chat:
    if not any(message["role"] == ASSISTANT for message in messages[learned_from:]):
        roles = ", ".join(repr(message["role"]) for message in messages[learned_from:])
        raise ValueError(
            f"{where}: no message in {column} is of the role {ASSISTANT!r}, so that nothing of it would be learned; "
            f"its roles are: {roles}."
        )
    tools = _from_json(where, TOOLS, row.get(TOOLS), list)
    options = _from_json(where, OPTIONS, row.get(OPTIONS), dict)
    return Chat(messages, learned_from, tools or None, options or {})


def _messages(where: str, column: str, found: object) -> list[dict[str, Any]]:
    """A column's messages, each without the keys that hold nothing, which tables fill in."""
    messages: list[object] | None = _from_json(where, column, found, list)
    if not messages:
        raise ValueError(f"{where}: {column} holds no message; write [{{'role': ..., 'content': ...}}, ...].")
    return [_message(f"{where}: {column}[{number}]", message) for number, message in enumerate(messages)]


def _message(where: str, message: object) -> dict[str, Any]:
    """One message, its content a text: most templates of text models write a list of parts as it is, or drop it."""
    if isinstance(message, str) and message.lstrip().startswith("{"):  # as datasets writes messages of several forms
        message = _from_json(where, "the message", message, dict)
    if not isinstance(message, dict):
        raise ValueError(f"{where} is a {type(message).__name__}; write {{'role': ..., 'content': ...}}.")
    kept = {key: value for key, value in message.items() if value is not None}
    role, content = kept.get("role"), kept.get("content")
    if not isinstance(role, str):
        names = ", ".join(map(repr, message)) or "nothing"
        raise ValueError(f"{where} has no role; it has {names}. Write a role, such as 'user' or {ASSISTANT!r}.")
    if content is None and kept.get("tool_calls"):
        return kept | {"content": ""}
    if isinstance(content, str):
        require_text(where, content)
    elif _is_parts(content):
        kept["content"] = "".join(require_text(where, part["text"]) for part in content)
    else:
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{where} holds {kind} as its content; write a text, or a list of {{'type': 'text', ...}}.")
    return kept


def _is_parts(content: object) -> TypeGuard[Sequence[dict[str, str]]]:
    return (
        isinstance(content, Sequence)
        and bool(content)
        and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    )


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table, its cells without what the table filled in: it gives each record the keys of all, with None."""
    return {column: _drop_nulls(cell) for column, cell in row.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_json(where: str, column: str, value: object, kind: type) -> Any:
    """A value that tables may hold as JSON; None where there is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{where}: {column} is a text that is not JSON: {error}.") from error
    if value is not None and not isinstance(value, kind):
        wanted = "list" if kind is list else "JSON object"
        raise ValueError(f"{where}: {column} is a {type(value).__name__}, and should be a {wanted}.")
    return value
