"""Rows of chats: what is read of them, and what is wrong with one, named by its file and line."""

import json
from pathlib import Path

import pytest

from parscale.checkpoints.texts.documents import Chat, Completion
from parscale.checkpoints.texts.sources import open_source, read_documents

USER, ANSWER = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
OTHER_CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": {"y": 2}}}],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["x"]}}}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="chat.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def read(path):
    return [example for _, example in open_source(path)]


def test_rows_of_each_form(write):
    rows = [
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "a", "completion": "b"},
        {"text": "as before", "messages": "not looked at"},
        {"messages": [USER, CALL], "tools": json.dumps([TOOL]), "chat_template_kwargs": {"thinking": False}},
        {"messages": json.dumps([USER, ANSWER | {"tool_calls": None}])},
        {"messages": [json.dumps(USER), json.dumps(ANSWER)]},
        {"messages": [USER, ANSWER | {"content": [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}]}]},
        {"messages": [USER, CALL], "tools": [TOOL | {"strict": None}]},
    ]
    assert read(write(*rows)) == [
        Chat([USER, ANSWER]),
        Chat([USER, ANSWER], 1),
        Completion("a", "b"),
        "as before",
        Chat([USER, CALL | {"content": ""}], 0, [TOOL], {"thinking": False}),
        *[Chat([USER, ANSWER])] * 3,
        Chat([USER, CALL | {"content": ""}], 0, [TOOL | {"strict": None}]),  # a null of one's own is kept
    ]


def test_names_are_those_of_lines(write):
    path = write({"messages": [USER, ANSWER]}, {"prompt": "a", "completion": "b"})
    assert [name for name, _ in open_source(path)] == [f"{path}:1", f"{path}:2"]


def test_a_json_file_of_one_chat_is_one_row(write):
    assert read(write({"messages": [USER, ANSWER]}, name="chat.json")) == [Chat([USER, ANSWER])]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_tables(tmp_path, ending):
    """In which each message has the keys of all, without a value where a row has none."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [USER, CALL], "tools": [TOOL], "id": 1}, {"messages": [USER, ANSWER, OTHER_CALL], "id": 2}]
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / f"chat.{ending}"
    if ending == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    first, second = read(str(path))
    assert first.messages == [USER, CALL | {"content": ""}]
    assert second == Chat([USER, ANSWER, OTHER_CALL | {"content": ""}])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_row_without_a_text_holds_a_chat_also_where_all_rows_have_both_columns(write, tmp_path, ending):
    rows = [
        {"text": "a", "messages": None},
        {"text": None, "messages": [USER, ANSWER]},
        {"text": None, "messages": None},
        {"text": None, "prompt": "p", "completion": None},
    ]
    path = str(tmp_path / "chat.parquet")
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        columns = ("text", "messages", "prompt", "completion")
        filled = [dict.fromkeys(columns) | row for row in rows]
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(filled), path)
    else:
        path = write(*rows)
    assert read(path) == ["a", Chat([USER, ANSWER])]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER]}, "no message in messages is of the role 'assistant'.*; its roles are: 'user'"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "no message in completion is of the role 'assistant'"),
        ({"messages": []}, "messages holds no message; write"),
        ({"messages": None}, "prompt holds no message"),
        ({"messages": "Hello?"}, "messages is a text that is not JSON"),
        ({"messages": {"role": "user"}}, "messages is a dict, and should be a list"),
        ({"messages": [USER, "Yes."]}, r"messages\[1\] is a str; write \{'role'"),
        ({"messages": [{"from": "human", "value": "a"}]}, r"messages\[0\] has no role; it has 'from', 'value'"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] holds nothing as its content"),
        ({"messages": [USER | {"content": []}, ANSWER]}, r"messages\[0\] holds a list as its content; write a text"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\] holds a int as its content; write a text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, r"messages\[0\]: character 1 is .*half of a character"),
        ({"prompt": "a", "completion": [ANSWER]}, "prompt is a str and completion a list; make both texts"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": "\ud83d"}, "completion: character 1 is"),
        ({"messages": [USER, ANSWER], "tools": {"f": 1}}, "tools is a dict, and should be a list"),
        ({"body": "a"}, "has no column 'text'; it has: 'body'.*A row of chats has messages, or prompt and completion"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(write, row, said):
    path = write({"messages": [USER, ANSWER]}, row)
    with pytest.raises(ValueError, match=rf"chat\.jsonl, line 2.*{said}"):
        read(path)


def test_texts_to_measure_are_no_chats(write):
    """`parscale eval` and others measure text alone."""
    said = "line 2, holds a chat, which only training reads; give rows of text"
    for empty, chat in (
        ({"text": " "}, {"messages": [USER, ANSWER]}),
        ({"text": None, "messages": None}, {"text": None, "messages": [USER, ANSWER]}),
    ):
        assert read_documents([Path(write({"text": "a"}, empty))])[0][1] == "a"
        with pytest.raises(ValueError, match=said):
            read_documents([Path(write(empty, chat))])
