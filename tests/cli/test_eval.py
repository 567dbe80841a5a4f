"""`parscale eval`: the figures are those of `evaluate` and `evaluate_tasks`, and of lm-eval's own command."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
from lm_eval.tasks import _index
from transformers import AutoTokenizer

import parscale
from parscale.checkpoints.evaluation.tasks import evaluate_tasks, scores
from parscale.checkpoints.evaluation.text_loss import evaluate
from parscale.cli.application import run

TASKS = Path(__file__).parents[1] / "data" / "lm_eval"
NEXT_LINE, PROSE, REST_OF_LINE = (str(TASKS / f"{name}.yaml") for name in ("next_line", "prose", "rest_of_line"))


pytestmark = pytest.mark.usefixtures("brief_lm_eval")


def measure(capsys, *arguments: object) -> dict:
    assert run(["eval", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def files(text_file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("import os\n")
    return [text_file, other]


@pytest.mark.parametrize("streams", [None, "off", "other"])
def test_figures(two_sets, files, capsys, streams):
    model, tokenizer = parscale.load(two_sets), AutoTokenizer.from_pretrained(two_sets)
    if streams is not None:
        model.set_streams(None if streams == "off" else streams)
    expected = evaluate(model, tokenizer, [(str(path), path.read_text()) for path in files], sequence_length=64)
    option = [] if streams is None else ["--streams", streams]
    figures = measure(capsys, two_sets, "--data", *files, "--sequence-length", 64, *option)
    assert figures["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(expected.loss), rel=1e-6)
    assert figures["tokens"] == expected.tokens == sum(len(path.read_bytes()) - 1 for path in files)
    assert figures["streams"] == {None: 3, "off": "off", "other": 2}[streams]
    assert [document["name"] for document in figures["documents"]] == [str(path) for path in files]


def test_off_is_the_backbone(two_sets, backbone, files, capsys, tmp_path):
    """In the same precision, the streams' absence leaves the plain model's loss to the last bit."""
    import torch
    from transformers import LlamaForCausalLM

    plain = tmp_path / "plain"
    LlamaForCausalLM.from_pretrained(backbone, dtype=torch.float32).save_pretrained(plain)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(plain)
    off = measure(capsys, two_sets, "--data", *files, "--streams", "off")
    assert off["loss"] == measure(capsys, plain, "--data", *files)["loss"]


def test_as_text(two_sets, files, capsys):
    assert run(["eval", str(two_sets), "--data", str(files[0])]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines} >= {"loss", "perplexity", "tokens"}
    assert ["documents", "1"] in lines


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt does not exist; give a text file"),
        (["--data", "."], ". is a folder; give a text file"),
        (["--sequence-length", "1"], "sequence_length is 1, and must be between 2 and the model's 128 positions"),
        (["--sequence-length", "129"], "sequence_length is 129"),
        (["--batch-size", "0"], "batch_size is 0, and must be at least 1"),
        (["--streams", "nothing"], "nothing"),
    ],
)
def test_bad_input(two_sets, text_file, capsys, options, complaint):
    data = [] if "--data" in options else ["--data", str(text_file)]
    assert run(["eval", str(two_sets), *data, *options]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


SOME_TASKS = """
from pathlib import Path
from lm_eval.tasks import _index

find, own = _index.TaskIndex._iter_yaml_files, Path(_index.__file__).parent
_index.TaskIndex._iter_yaml_files = staticmethod(lambda root: find(root / "hellaswag" if root == own else root))
"""


@pytest.fixture(params=["some", pytest.param("all", marks=pytest.mark.nightly)])
def own_tasks(request, monkeypatch):
    """By day lm-eval finds some of its own tasks alone, of which it takes ten seconds to read all.

    Returns the code for another process that is to find the same.
    """
    if request.param == "all":
        return ""
    monkeypatch.setattr(_index.TaskIndex, "_iter_yaml_files", _index.TaskIndex._iter_yaml_files)  # put back at the end
    exec(SOME_TASKS, {})
    return SOME_TASKS


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.mark.parametrize("streams", [None, "off", "other"])
def test_tasks(two_sets, capsys, streams, tmp_path):
    model, tokenizer = parscale.load(two_sets), AutoTokenizer.from_pretrained(two_sets)
    if streams is not None:
        model.set_streams(None if streams == "off" else streams)
    expected = evaluate_tasks(model, tokenizer, [NEXT_LINE, PROSE], limit=2, batch_size=4)
    option = [] if streams is None else ["--streams", streams]
    capsys.readouterr()
    options = [*option, "--limit", 2, "--batch-size", 4, "--output", tmp_path / "results.json"]
    figures = measure(capsys, two_sets, "--tasks", NEXT_LINE, PROSE, *options)
    assert scores(figures) == scores(expected)
    assert figures["parscale"] == expected["parscale"] | {"checkpoint": str(two_sets)}
    assert figures["parscale"]["streams"] == (streams or "default")
    assert figures["parscale"]["num_streams"] == {None: 3, "off": 1, "other": 2}[streams]
    assert figures["n-samples"]["prose"] == {"original": 5, "effective": 2}
    assert json.loads((tmp_path / "results.json").read_text()) == figures
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_tasks_as_text(two_sets, capsys):
    arguments = ["--tasks", NEXT_LINE, PROSE, "--num-fewshot", "0", "--limit", "3"]
    assert run(["eval", str(two_sets), *arguments]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["num", "streams", "3"] in lines
    assert ["streams", "default"] in lines
    (acc,) = [line for line in lines if line[:2] == ["next_line", "acc"]]
    assert acc[-4:] == ["3", "of", "11", "0"]
    assert ["prose", "word_perplexity", "none"] in [line[:3] for line in lines]


def test_tasks_of_streams_only_and_plain_checkpoints(two_sets, backbone, capsys, tmp_path):
    parscale.load(two_sets, dtype="bfloat16").save_streams(tmp_path / "streams")
    AutoTokenizer.from_pretrained(two_sets).save_pretrained(tmp_path / "streams")
    fields = json.loads((tmp_path / "streams" / "parscale_config.json").read_text())
    fields["base_model_name_or_path"] = str(backbone)
    (tmp_path / "streams" / "parscale_config.json").write_text(json.dumps(fields))
    plain = measure(capsys, backbone, "--tasks", PROSE)
    off = measure(capsys, tmp_path / "streams", "--tasks", PROSE, "--streams", "off")
    on = measure(capsys, tmp_path / "streams", "--tasks", PROSE)
    assert scores(plain) == scores(off) != scores(on)
    assert [figures["parscale"]["num_streams"] for figures in (plain, off, on)] == [1, 1, 3]


def test_text_figures_are_stamped(two_sets, text_file, capsys, tmp_path):
    figures = measure(capsys, two_sets, "--data", text_file, "--output", tmp_path / "results.json")
    assert figures["parscale"] | {"versions": None} == {
        "checkpoint": str(two_sets),
        "num_streams": 3,
        "streams": "default",
        "versions": None,
    }
    assert json.loads((tmp_path / "results.json").read_text()) == figures


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tasks", "helaswag"], "has no task 'helaswag'; did you mean hellaswag"),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml is not a file"),
        (["--limit", "0"], "limit is 0, and must be a number of questions, or a share of them"),
        (["--limit", "1.5"], "limit is 1.5, and must be"),
        (["--batch-size", "0"], "batch_size is 0, and must be at least 1"),
        (["--num-fewshot", "-1"], "num_fewshot is -1, and must be at least 0"),
        (["--include-path", "nowhere"], "There is no folder nowhere"),
        (["--sequence-length", "129"], "sequence_length is 129, and must be between 2 and the model's 128 positions"),
        (
            ["--streams", "nothing"],
            "; there are: 'default', 'other', and 'off' for the plain backbone.",
        ),
        (["--output", "nowhere/results.json"], "There is no folder nowhere"),
        (["--output", "."], ". is a folder"),
        (["--output", "/proc/results.json"], "/proc/results.json: cannot be written"),
    ],
)
@pytest.mark.usefixtures("own_tasks")
def test_bad_input_for_tasks(two_sets, capsys, options, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = [] if "--tasks" in options else ["--tasks", PROSE]
    assert run(["eval", str(two_sets), *tasks, *options]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_tasks_need_a_tokenizer(two_sets, capsys, tmp_path):
    parscale.load(two_sets).save_pretrained(tmp_path)
    assert run(["eval", str(tmp_path), "--tasks", PROSE]) == 2
    assert f"{tmp_path} has no tokenizer" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_printed(two_sets, text_file, capsys, tmp_path, monkeypatch):
    """The folder may vanish while the model runs."""
    monkeypatch.setattr("parscale.cli.evaluate.require_writable", lambda path: None)
    output = tmp_path / "gone" / "results.json"
    assert run(["eval", str(two_sets), "--data", str(text_file), "--json", "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["loss"] > 0
    assert f"{output}: cannot be written (No such file or directory)" in printed.err


def test_a_result_that_cannot_be_printed_is_written(two_sets, text_file, capsys, tmp_path, monkeypatch):
    """The reader may have gone, as `less` does, or its encoding may lack a letter."""

    def broken(figures):
        raise UnicodeEncodeError("cp1252", "\u03c0", 0, 1, "no such letter")

    monkeypatch.setattr("parscale.cli.evaluate.print_json", broken)
    output = tmp_path / "results.json"
    assert run(["eval", str(two_sets), "--data", str(text_file), "--json", "--output", str(output)]) == 2
    assert json.loads(output.read_text())["loss"] > 0
    assert "no such letter" in capsys.readouterr().err


LM_EVAL = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


@pytest.fixture
def lm_eval(programs, tmp_path):
    """lm-eval's own command in a process that has not imported parscale."""

    def run(*arguments, start):
        return programs.run("-c", start, *arguments, cwd=tmp_path)

    return run


@pytest.mark.slow
def test_the_stock_lm_eval_command_gives_the_same_scores(two_sets, capsys, lm_eval, own_tasks, tmp_path):
    """`lm_eval --model hf` reads a full folder by its remote code."""
    tasks = ("next_line", "prose", "rest_of_line")
    finished = lm_eval(
        *("--model", "hf", "--model_args", f"pretrained={two_sets},trust_remote_code=True", "--device", "cpu"),
        *("--tasks", ",".join(tasks), "--include_path", TASKS, "--batch_size", 8, "--output_path", "stock.json"),
        start=own_tasks + LM_EVAL,
    )
    assert finished.returncode == 0, finished.stderr
    (written,) = tmp_path.glob("stock*.json")
    stock = json.loads(written.read_text())
    ours = measure(capsys, two_sets, "--tasks", *tasks, "--include-path", TASKS)
    assert {task for task, *_ in scores(ours)} == set(tasks)
    assert [row[:3] for row in scores(stock)] == [row[:3] for row in scores(ours)]
    assert [value for *_, value, _ in scores(stock)] == pytest.approx(
        [value for *_, value, _ in scores(ours)], rel=1e-6
    )
    for name in ("versions", "n-shot", "n-samples", "higher_is_better"):
        assert stock[name] == ours[name]


@pytest.mark.slow
def test_lm_eval_without_parscale_says_what_to_install(two_sets, lm_eval):
    blocked = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "parscale":
            raise ModuleNotFoundError("No module named 'parscale'", name="parscale")

sys.meta_path.insert(0, Blocker())
from lm_eval.models.huggingface import HFLM
HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu")
"""
    finished = lm_eval(two_sets, start=blocked)
    assert finished.returncode != 0
    assert "from a clone of its repository: pip install ." in finished.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_interrupted(two_sets, tmp_path, programs):
    """While questions run: exit code 130, one line, no file."""
    (tmp_path / "documents.py").write_text((TASKS / "documents.py").read_text())
    (tmp_path / "prose.jsonl").write_text(json.dumps({"text": "word " * 50_000}) + "\n")
    (tmp_path / "prose.yaml").write_text(Path(PROSE).read_text())
    before = sorted(tmp_path.iterdir())
    arguments = ["eval", two_sets, "--tasks", "prose.yaml", "--batch-size", "1", "--output", "results.json", "--json"]
    program = programs.start("-m", "parscale", *arguments, "--device", "cpu", cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    while "Running loglikelihood" not in program.stderr:
        assert program.is_running(), program.stderr
        time.sleep(0.1)
    os.kill(program.pid, signal.SIGINT)
    assert program.wait() == 130
    assert program.stdout == ""
    assert program.stderr.endswith("parscale: interrupted.\n")
    assert sorted(tmp_path.iterdir()) == before
