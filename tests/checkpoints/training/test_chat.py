"""Chats as rows to train on, against TRL's own reading of the same data and templates, and runs on them."""

import copy
import json
import shutil
from importlib import resources

import pytest
import torch
from torch.nn.functional import cross_entropy
from training_runs import stopped_after
from transformers import AutoTokenizer

from parscale import load
from parscale.checkpoints.texts.documents import Chat, Completion
from parscale.checkpoints.training.packing import IGNORED, Blocks, Encoder, pack
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.train import Interrupted, TrainSettings, train

MARKED = """\
{%- for message in messages %}{{- message.role + ': ' }}
{%- if message.role == 'assistant' %}{%- generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{- message.content }}{%- endif %}{{- '|' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"""
# An earlier answer loses its thoughts once something follows, as in many templates of models that think.
FORGETFUL = """\
{%- for message in messages %}{{- message.role + ':' }}
{%- if message.role == 'assistant' and loop.last %}{{- '(thought)' }}{%- endif %}
{{- message.content + ';' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{% endif %}"""


def message(role, content):
    return {"role": role, "content": content}


TURNS = [message("user", "one?"), message("assistant", "1"), message("user", "two?"), message("assistant", "22")]
SHORT = TURNS[:2]


def with_template(tokenizer, template, specials=()):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer, example):
    """Each document of an example as text, and the pieces of it that are learned."""
    found = []
    for encoded in Encoder(tokenizer)([("row", example)]):
        pieces, inside = [], False
        for token, is_learned in zip(encoded.ids, encoded.loss_mask, strict=True):
            if is_learned:
                pieces = [*pieces[:-1], [*pieces[-1], token]] if inside else [*pieces, [token]]
            inside = is_learned
        found.append((tokenizer.decode(encoded.ids), [tokenizer.decode(piece) for piece in pieces]))
    return found


def test_marks_say_what_is_learned(byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, MARKED)
    text = "user: one?|assistant: 1<end>|user: two?|assistant: 22<end>|"
    assert learned(tokenizer, Chat(TURNS)) == [(text, ["1<end>", "22<end>"])]
    assert learned(tokenizer, Chat(TURNS, 2)) == [(text, ["22<end>"])]


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(byte_tokenizer):
    """A run that goes on tomorrow has to read what it began with."""
    tokenizer = with_template(byte_tokenizer, "{{- strftime_now('%d %b %Y') }}" + MARKED)
    assert [text[:12] for text, _ in learned(tokenizer, Chat(SHORT))] == ["26 Jul 2024u"]


def test_turns_are_told_by_what_they_add(byte_tokenizer):
    template = MARKED.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = with_template(byte_tokenizer, template)
    text = "user: one?|assistant: 1<end>|user: two?|assistant: 22<end>|"
    assert learned(tokenizer, Chat(TURNS)) == [(text, ["1<end>|", "22<end>|"])]
    assert learned(tokenizer, Chat(TURNS, 2)) == [(text, ["22<end>|"])]


def test_a_template_that_changes_earlier_turns(byte_tokenizer):
    """Each answer is learned behind the chat as it was then."""
    tokenizer = with_template(byte_tokenizer, FORGETFUL)
    assert learned(tokenizer, Chat(TURNS)) == [
        ("user:one?;assistant:(thought)1;", ["(thought)1;"]),
        ("user:one?;assistant:1;user:two?;assistant:(thought)22;", ["(thought)22;"]),
    ]


def test_a_completion_ends_the_text(byte_tokenizer):
    assert learned(byte_tokenizer, Completion("def f", "(x):")) == [("def f(x):<end>", ["(x):<end>"])]


@pytest.mark.parametrize(
    ("example", "template", "said"),
    [
        (Chat(SHORT), None, "row is a chat, and the tokenizer has no chat template; put a file chat_template.jinja"),
        (Chat(SHORT), "{{ raise_exception('Roles must alternate') }}", "row: the chat template refuses .*alternate"),
        (Chat(SHORT), "{% if %}", "row: the chat template refuses these messages"),
        (Chat(SHORT), "{{ messages[0].content }}", "row: the chat template writes nothing of what the assistant says"),
    ],
)
def test_templates_that_do_not_fit(byte_tokenizer, example, template, said):
    tokenizer = with_template(byte_tokenizer, template)
    with pytest.raises(ValueError, match=said):
        list(Encoder(tokenizer)([("row", example)]))


# -- TRL reads the same rows


SPECIALS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
}
ROWS = [
    {"messages": TURNS},
    {"messages": [message("user", "three?"), message("assistant", "333")]},
    {"messages": [*TURNS, message("user", "and?"), message("assistant", "no more")]},
]


def of_trl(model, tokenizer, rows, folder, **options):
    """TRL's own token ids and labels of rows."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    settings = trl.SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None, **options)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def of_ours(tokenizer, rows, folder):
    from parscale.checkpoints.texts.sources import open_source

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = list(Encoder(tokenizer)(open_source(str(path))))
    return [
        (
            each.ids,
            [token if is_learned else IGNORED for token, is_learned in zip(each.ids, each.loss_mask, strict=True)],
        )
        for each in documents
    ]


@pytest.mark.parametrize("name", ["marked", *SPECIALS])
def test_chats_are_read_as_trl_reads_them(backbone, byte_tokenizer, tmp_path, name):
    """TRL brings variants with marks of known templates without; ours are told by what turns add."""
    pytest.importorskip("trl")
    if name == "marked":
        tokenizer = with_template(byte_tokenizer, MARKED)
    else:
        template = (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()
        tokenizer = with_template(byte_tokenizer, template, SPECIALS[name])
        if name != "qwen2_5":
            tokenizer.bos_token = SPECIALS[name][0]
    model = load_plain(backbone)
    theirs = of_trl(model, tokenizer, ROWS, tmp_path, assistant_only_loss=True)
    ours = of_ours(tokenizer, ROWS, tmp_path)
    if name == "qwen2_5":  # TRL's variant also learns the line break of the prompt to generate
        newline = tokenizer("\n")["input_ids"][0]
        role = tokenizer("assistant")["input_ids"]
        for ids, labels in theirs:
            for place in range(len(ids)):
                if ids[place] == newline and ids[place - len(role) : place] == role:
                    labels[place] = IGNORED
    assert ours == theirs
    assert all(any(label != IGNORED for label in labels) for _, labels in ours)


PAIRS = [{"prompt": TURNS[:3], "completion": TURNS[3:]}, {"prompt": SHORT[:1], "completion": SHORT[1:]}]


def test_prompts_and_completions_as_trl_reads_them(backbone, byte_tokenizer, tmp_path):
    tokenizer = with_template(byte_tokenizer, MARKED)
    theirs = of_trl(load_plain(backbone), tokenizer, PAIRS, tmp_path, assistant_only_loss=True)
    assert of_ours(tokenizer, PAIRS, tmp_path) == theirs
    texts = [{"prompt": "def f", "completion": "(x):"}, {"prompt": "for", "completion": " i in x"}]
    assert of_ours(tokenizer, texts, tmp_path) == of_trl(load_plain(backbone), tokenizer, texts, tmp_path)


def load_plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# -- packed, and trained on


def test_blocks_hold_what_is_learned(byte_tokenizer):
    """Text and chats side by side; a block of a prompt alone is left out."""
    tokenizer = with_template(byte_tokenizer, MARKED)
    long = Chat([message("user", "x" * 40), message("assistant", "y" * 6)])
    blocks = Blocks(pack(Encoder(tokenizer)([("text", "a" * 15), ("chat", long)]), 16), 16)
    texts = [tokenizer.decode(ids) for ids in blocks.ids]
    assert texts == ["a" * 15 + "<end>", "ssistant: yyyyyy"]  # the chat's first three blocks are left out
    labels = [blocks[number]["labels"].tolist() for number in range(2)]
    assert labels[0] == [IGNORED, *blocks.ids[0][1:]]
    assert labels[1] == [IGNORED] * 10 + [*blocks.ids[1][10:]]
    plain = Blocks(pack(Encoder(tokenizer)([("text", "a" * 15)]), 16), 16)
    assert plain.learned is None
    other = copy.copy(blocks)
    other.learned = blocks.learned ^ True
    assert other.fingerprint() != blocks.fingerprint()


@pytest.fixture(scope="module")
def chat_model(full, tmp_path_factory):
    """A full checkpoint whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "full"
    shutil.copytree(full, folder)
    with_template(AutoTokenizer.from_pretrained(full), MARKED).save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [message("user", f"{n}?"), message("assistant", str(n) * 3)] * 2} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(path, **options):
    given = {"data": [str(path)], "tokens": 4 * 128, "sequence_length": 32, "batch_size": 4, "freeze_backbone": True}
    return TrainSettings(**given | {"bf16": False, "save_every": 1, "warmup": 0.0} | options)


def test_the_loss_is_that_of_the_assistants_tokens(chat_model, chats, tmp_path):
    """Against the model, each chat by itself and what is learned told by the text alone."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:2]))
    chosen = settings(chats, eval_data={"few": str(few)}, sequence_length=128)
    with pytest.warns(
        UserWarning, match="not compared with the untouched backbone on few, .*: chats are measured while"
    ):
        report = train(str(chat_model), tmp_path / "run", chosen)
    model, tokenizer = load(chat_model, dtype=torch.float32), AutoTokenizer.from_pretrained(chat_model)
    total = count = 0.0
    for number in range(2):
        turns = [("user: ", f"{number}?|"), ("assistant: ", f"{number * 111:03}<end>"), ("|", "")] * 2
        pieces = [tokenizer(text)["input_ids"] for turn in turns for text in turn]
        ids = torch.tensor([token for piece in pieces for token in piece])
        places = [place % 6 == 3 for place, piece in enumerate(pieces) for _ in piece]
        with torch.no_grad():
            losses = cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")
        wanted = torch.tensor(places[1:])
        total, count = total + losses[wanted].sum().item(), count + int(wanted.sum())
    assert count == 2 * 2 * 4
    assert report["losses"]["few"]["before"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(chat_model, chats, tmp_path, streaming):
    chosen = settings(chats, streaming=streaming)
    train(str(chat_model), tmp_path / "whole", chosen)

    with stopped_after(2), pytest.raises(Interrupted):
        train(str(chat_model), tmp_path / "run", chosen)
    train(str(chat_model), tmp_path / "run", chosen, resume=True)
    lines = [[line | {"tokens_per_second": 0} for line in Run(tmp_path / name).metrics()] for name in ("whole", "run")]
    assert lines[0] == lines[1]
    whole, again = load(tmp_path / "whole"), load(tmp_path / "run")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in whole.named_parameters())


def test_what_is_wrong_is_said_before_anything_is_written(full, chat_model, chats, tmp_path):
    with pytest.raises(ValueError, match=r"chats\.jsonl:1 is a chat, and the tokenizer has no chat template"):
        train(str(full), tmp_path / "run", settings(chats))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "x" * 70, "completion": "y"}) + "\n")
    with pytest.raises(ValueError, match=r"Nothing is learned in any sequence of 64 tokens.*a larger sequence length"):
        train(str(chat_model), tmp_path / "run", settings(long, sequence_length=64, tokens=256))
    chats.write_text(chats.read_text() + json.dumps({"messages": [message("user", "and?")]}) + "\n")
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 41: no message in messages is of the role 'assistant'"):
        train(str(chat_model), tmp_path / "run", settings(chats))
    assert not (tmp_path / "run").exists()
