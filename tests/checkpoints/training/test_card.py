"""The model card states every fact, whatever the names; an upload takes the model and leaves the Trainer's files."""

import ast
import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from parscale import wrap
from parscale.checkpoints.control_runs import _rewrite_card
from parscale.checkpoints.training import upload
from parscale.checkpoints.training.held_out import TRAINED, UNTOUCHED
from parscale.checkpoints.training.model_card import TextLosses, TrainingFacts, model_card
from parscale.checkpoints.training.train import TrainSettings, train
from parscale.checkpoints.training.upload import push

FACTS = TrainingFacts(
    checkpoint="me/parallel-qwen",
    backbone_class="Qwen2ForCausalLM",
    backbone="Qwen/Qwen2.5-0.5B",
    num_streams=6,
    prefix_length=37,
    smoothing=0.125,
    init="context",
    transform="prefix",
    trains="streams",
    trained_parameters=3_456_789,
    parameters=497_456_789,
    tokens=250_000_128,
    sequence_length=2048,
    batch_size=24,
    learning_rates={"streams": 0.03, "backbone": 3e-05},
    schedule="5 % linear warmup, then linear to zero",
    data=("bigcode/the-stack", "src/more.txt"),
    command="parscale train parallel --data bigcode/the-stack src/more.txt --output parallel-qwen",
    losses={"held-out code": TextLosses(2.44951, 2.47, 2.43364), "prose": TextLosses(3.7, None, 3.7102)},
    versions={"parscale": "0.1.0", "torch": "2.13.0"},
    datasets=("bigcode/the-stack",),
)
NASTY = "a|b`c``d <e> *f* _g_ [h](i) #j\nk: \"l\" 'm' \\n --- &amp; ünï 日本"


def cells(text: str) -> list[list[str]]:
    """The cells of all table rows, as a Markdown reader splits them: at each bar that is not escaped."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def blocks(text: str) -> list[str]:
    """What stands in fenced code."""
    return [match[2] for match in re.finditer(r"^(`{3,})\w*\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)]


def in_code(text: str) -> str:
    """The contents of the one code span that a cell is."""
    ticks = re.match("`+", text)[0]
    assert text.endswith(ticks)
    inner = text.removeprefix(ticks).removesuffix(ticks)
    assert ticks not in re.findall("`+", inner)
    return inner[1:-1] if inner.startswith(" `") or inner.endswith("` ") else inner


def test_the_front_matter_is_what_the_hub_reads():
    assert ModelCard(model_card(FACTS)).data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "datasets": ["bigcode/the-stack"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["parscale"],
    }


@pytest.mark.parametrize("backbone", [None, "/models/qwen", "../qwen", "models/of/mine", NASTY])
def test_only_names_on_the_hub_are_links(backbone):
    facts = dataclasses.replace(FACTS, backbone=backbone, datasets=())
    data = ModelCard(model_card(facts)).data.to_dict()
    assert not {"base_model", "datasets"} & data.keys()


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in ModelCard(model_card(dataclasses.replace(FACTS, backbone="models/qwen"))).data.to_dict()


def test_every_fact_is_stated():
    text = ModelCard(model_card(FACTS)).text
    rows = {row[0]: row[1:] for row in cells(text)}
    assert "# me/parallel-qwen\n" in text
    assert "`Qwen/Qwen2.5-0.5B` (Qwen2ForCausalLM) with 6 parallel streams" in text
    assert rows["P, the number of parallel streams"] == ["6"]
    assert rows["T, tokens of each stream's prefix or prompt"] == ["37"]
    assert rows["How the streams differ"] == ["`prefix`"]
    assert rows["Smoothing of the aggregation weights"] == ["0.125"]
    assert rows["How the streams start"] == ["`context`"]
    assert "the backbone was frozen" in rows["trained"][0]
    assert rows["trained parameters"] == ["3,456,789 of 497,456,789 (0.69 %)"]
    assert rows["Tokens to train on"] == ["250,000,128"]
    assert rows["Tokens in a sequence"] == ["2,048"]
    assert rows["Sequences in an optimizer step"] == ["24, of 49,152 tokens"]
    assert rows["learning rates, at their peak"] == ["`streams` 0.03, `backbone` 3e-05"]
    assert rows["schedule"] == ["5 % linear warmup, then linear to zero"]
    assert rows["Training text"] == ["`bigcode/the-stack`, `src/more.txt`"]
    assert rows["`held-out code`"] == ["2.4495", "2.4700", "2.4336", "-0.0159"]
    assert rows["`prose`"] == ["3.7000", "-", "3.7102", "+0.0102"]
    assert rows["`parscale`"] == ["`0.1.0`"]
    assert rows["`torch`"] == ["`2.13.0`"]
    assert FACTS.command in blocks(text)
    assert "2505.10475" in blocks(text)[-1]


def test_what_was_not_gained_is_said():
    assert "No gain over the backbone on: `prose`." in model_card(FACTS)
    gained = dataclasses.replace(FACTS, losses={"code": TextLosses(2.0, 2.1, 1.9)})
    assert "No gain" not in model_card(gained)
    assert "Not measured." in model_card(dataclasses.replace(FACTS, losses={}))


def test_a_text_without_a_middle_gets_a_verdict_too():
    entry = {"arm": TRAINED, "baseline": UNTOUCHED, "where": "beginning", "documents": 2, "loss": 1.0}
    entry |= {"baseline_loss": 2.0, "difference": -1.0, "low": -1.1, "high": -0.9}
    entries = [entry | {"text": "notes"}, entry | {"text": "code"}, entry | {"text": "code", "where": "middle"}]
    facts = dataclasses.replace(FACTS, comparisons=entries, controls={"alone": "backbone alone"})
    text = model_card(facts)
    assert "No document of `notes` is long enough for a middle, where a gain has to show." in text
    assert "Streams in the middle of `code`: ahead of each control" in text
    assert "No document of" not in model_card(dataclasses.replace(facts, comparisons=entries[1:]))


@pytest.mark.parametrize(("trains", "words"), [("everything", "streams and backbone"), ("lora", "a LoRA adapter")])
def test_what_was_trained_is_said(trains, words):
    rows = {row[0]: row[1] for row in cells(model_card(dataclasses.replace(FACTS, trains=trains)))}
    assert words in rows["trained"]


def test_something_else_cannot_have_been_trained():
    with pytest.raises(ValueError, match="trains is 'heads', and must be one of streams, everything, lora"):
        dataclasses.replace(FACTS, trains="heads")


def test_names_may_hold_anything():
    """No character of a name ends a table's cell, a code block, a string or the front matter."""
    changes = {
        "checkpoint": NASTY,
        "backbone": NASTY,
        "init": NASTY,
        "schedule": NASTY,
        "command": f"parscale train '{NASTY}'\n```\n---\nrm",
        "data": (NASTY, "b"),
        "datasets": (NASTY,),
        "learning_rates": {NASTY: 1e-3},
        "losses": {NASTY: TextLosses(1.0, 2.0, 0.5)},
        "versions": {NASTY: NASTY},
    }
    read = ModelCard(model_card(dataclasses.replace(FACTS, **changes)))
    assert read.data.to_dict()["datasets"] == [NASTY]
    line = NASTY.replace("\n", " ")
    table = cells(read.text)
    assert {len(row) for row in table} == {2, 5}
    named = [row for row in table if row[0].startswith("```") and line in row[0]]
    assert [in_code(row[0]) for row in named] == [line, line]
    assert named[0][1:] == ["1.0000", "2.0000", "0.5000", "-0.5000"]
    assert in_code(named[1][1]) == line
    python, command, _ = blocks(read.text)
    assert command == changes["command"]
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    names = [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
    assert names.count(NASTY) == 2
    title = next(line for line in read.text.splitlines() if line.startswith("# "))
    assert re.sub(r"\\(.)", r"\1", title.removeprefix("# ")) == " ".join(NASTY.split())
    assert not re.search(r"(?<!\\)[`*_<\[|]", title.replace("\\\\", ""))


def test_the_program_on_the_card_says_where_the_backbone_comes_from():
    on_hub = dataclasses.replace(FACTS, streams_only=True)
    assert "backbone=" not in blocks(model_card(on_hub))[0]
    assert ModelCard(model_card(on_hub)).data.library_name == "parscale"
    assert "backbone=" in blocks(model_card(dataclasses.replace(on_hub, backbone="/models/qwen")))[0]


# ---- push


class StandIn:
    """Keeps what `HfApi` is asked for."""

    def __init__(self, token=None):
        self.token = token
        StandIn.calls = []

    def create_repo(self, repo_id, **options):
        StandIn.calls.append(("create_repo", repo_id, self.token, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def model_info(self, repo_id):
        return SimpleNamespace(private=True)

    def upload_folder(self, **options):
        StandIn.calls.append(("upload_folder", options))
        return SimpleNamespace(commit_url="https://the.hub/me/commit")

    def upload_file(self, **options):
        StandIn.calls.append(("upload_file", options))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(upload, "HfApi", StandIn)
    StandIn.calls = []
    return StandIn


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return wrap(LlamaForCausalLM(config), 2, prefix_length=2, init="random", seed=0)


@pytest.fixture
def trained(model, tmp_path):
    """A folder as training leaves it."""
    folder = tmp_path / "trained"
    model.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(FACTS), encoding="utf-8")
    for name in ("metrics.jsonl", "run.json", "training.json", "loss.png"):
        (folder / name).write_text("x")
    for inner in ("checkpoint-5", "runs"):
        (folder / inner).mkdir()
        (folder / inner / "optimizer.pt").write_text("x")
    (folder / ".hidden").write_text("x")
    return folder


def uploaded(folder, patterns):
    """What the Hub's own client takes of a folder."""
    from huggingface_hub.utils import filter_repo_objects

    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return set(filter_repo_objects(files, ignore_patterns=patterns))


@pytest.mark.parametrize("private", [None, False, True])
def test_push(api, trained, private):
    assert push(trained, "mine", private=private, token="secret") == "https://the.hub/me/commit"
    (first, name, token, options), (second, files_of) = api.calls
    assert (first, name, token, options) == ("create_repo", "mine", "secret", {"private": private, "exist_ok": True})
    assert (second, files_of["repo_id"], files_of["folder_path"]) == ("upload_folder", "me/mine", trained)
    files = uploaded(trained, files_of["ignore_patterns"])
    model_files = {"config.json", "generation_config.json", "model.safetensors", "modeling_parscale.py"}
    assert files == {"README.md", "training.json", "loss.png"} | model_files


@pytest.mark.parametrize("name", ["checkpoint-2000", "runs", "controls"])
def test_a_set_with_the_name_of_a_run_s_folder_is_uploaded(api, model, trained, name):
    model.add_streams(name, 2, prefix_length=2, init="random")
    for file in (trained / "runs").iterdir():
        file.unlink()
    (trained / "runs").rmdir()
    model.save_pretrained(trained)
    push(trained, "mine")
    files = uploaded(trained, api.calls[-1][1]["ignore_patterns"])
    assert {f"{name}/streams.safetensors", f"{name}/parscale_config.json"} < files
    assert "checkpoint-5/optimizer.pt" not in files


@pytest.mark.parametrize(("backbone", "warns"), [("Qwen/Qwen2.5-0.5B", False), ("/models/qwen", True)])
def test_streams_whose_backbone_others_cannot_reach(api, model, tmp_path, recwarn, backbone, warns):
    model.config._name_or_path = backbone
    model.save_streams(tmp_path / "streams")
    (tmp_path / "streams" / "README.md").write_text("x")
    push(tmp_path / "streams", "mine")
    assert any("is not on the Hub" in str(warning.message) for warning in recwarn) is warns
    assert len(api.calls) == 2


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), ValueError, "holds no README.md; write its model card first"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "it is not a checkpoint"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), FileNotFoundError, "There is no folder"),
    ],
)
def test_nothing_is_uploaded_of_what_is_no_trained_checkpoint(api, trained, prepare, error, message):
    prepare(trained)
    with pytest.raises(error, match=message):
        push(trained, "mine")
    assert api.calls == []


def test_the_card_of_a_run_says_the_name_of_the_repository(api, full, text_file, tmp_path):
    """Also with controls in it, with a header that was changed, and where what the run began with is gone."""
    start, folder = shutil.copytree(full, tmp_path / "start"), tmp_path / "local-name"
    sizes = {"tokens": 32, "sequence_length": 16, "batch_size": 2, "freeze_backbone": True, "bf16": False}
    report = train(str(start), folder, TrainSettings([str(text_file)], **sizes))
    shutil.rmtree(start)
    entry = {"arm": "trained", "baseline": "alone", "text": "code", "where": "middle", "documents": 2, "loss": 0.5}
    entry |= {"baseline_loss": 1.5, "difference": -1.0, "low": -1.25, "high": -0.75}
    for controls in (None, {"controls": {"alone": "backbone alone"}, "comparisons": [entry]}):
        if controls is not None:
            (folder / "controls.json").write_text(json.dumps(controls))
            _rewrite_card(folder, report, controls)
        push(folder, "mine")
        _, (_, of_folder), (_, of_card) = api.calls
        assert "README.md" not in uploaded(folder, of_folder["ignore_patterns"])
        assert (of_card["repo_id"], of_card["path_in_repo"]) == ("me/mine", "README.md")
        card = of_card["path_or_fileobj"].decode()
        assert "# me/mine\n" in card
        assert blocks(card)[0].count('("me/mine")') == 2
        assert "local-name" not in card
        assert ("backbone alone" in card) is (controls is not None)
        assert "local-name" in (folder / "README.md").read_text()
    written = (folder / "README.md").read_text()
    header = "---\nlicense: apache-2.0  # mine\nbase_model: Qwen/Qwen2.5-0.5B\n---\n"
    (folder / "README.md").write_text(header + written.split("\n---\n", 1)[1])
    push(folder, "mine")
    changed = api.calls[-1][1]["path_or_fileobj"].decode()
    assert changed == header + card.split("\n---\n", 1)[1]
    (folder / "README.md").write_text(written + "My own words.")
    with pytest.warns(UserWarning, match=r'was changed, so .* still says load\("local-name"\), .* name, me/mine\.'):
        push(folder, "mine")
    assert "README.md" in uploaded(folder, api.calls[-1][1]["ignore_patterns"])
    assert len(api.calls) == 2
