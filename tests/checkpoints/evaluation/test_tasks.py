"""lm-eval on models with streams: its figures follow from the model's logits, taken one text at a time."""

import contextlib
import json
import math
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.config.group import GroupConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, _index
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import wrap
from parscale.checkpoints.evaluation.harness_model import harness_model
from parscale.checkpoints.evaluation.tasks import RECIPES, evaluate_tasks, scores, stamp
from parscale.checkpoints.small_model import small_model_path

TASKS = Path(__file__).parents[2] / "data" / "lm_eval"
FILES = [str(TASKS / f"{name}.yaml") for name in ("next_line", "prose", "rest_of_line")]
WINDOW = 48  # of rolling log-likelihoods: the longest text takes several
# Of sums between 4 and 920 nats; measured: at most 1.2e-5 in float32 and 2e-14 in float64.
# some forty roundings in either dtype: processors without AVX-512 add in another order
TOLERANCE = {torch.float32: {"rel": 5e-6, "abs": 1e-5}, torch.float64: {"rel": 1e-14, "abs": 1e-12}}


pytestmark = pytest.mark.usefixtures("brief_lm_eval")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture
def own_tasks(monkeypatch):
    """Lets lm-eval find only some of the files of its own tasks; it takes ten seconds to read all."""
    find, own = _index.TaskIndex._iter_yaml_files, Path(_index.__file__).parent

    def only(chosen):
        some = staticmethod(lambda root: [path for path in find(root) if root != own or chosen(path)])
        monkeypatch.setattr(_index.TaskIndex, "_iter_yaml_files", some)

    return only


def of_hellaswag(path):
    return path.parent.name == "hellaswag"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(small_model_path())


def build(num_streams, dtype=torch.float32, kv="own"):
    """The small model, without streams (None) or with streams that matter, and a further set of two."""
    model = AutoModelForCausalLM.from_pretrained(small_model_path(), dtype=dtype)
    if num_streams is None:
        return model
    wrap(model, num_streams, prefix_length=6, init="random", seed=0, kv=kv)
    model.add_streams("other", 2, prefix_length=4, init="random", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for streams in model.parscale.sets.values():
            for name, tensor in model.parscale.tensors(streams).items():
                scale = 1.0 if ".prefix_" in name else 3.0 * tensor.shape[-1] ** -0.5
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return model


def documents(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def token_log_likelihoods(model, before, targets):
    """Of each target token, nats, in float64, and whether each is the likeliest; one text, nothing padded."""
    ids = [*before, *targets]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, -len(targets) :].double()
    chosen = torch.tensor(targets)
    values = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    return values, bool((logits.argmax(-1) == chosen).all())


def continuation(model, tokenizer, text, following):
    """log p(following | text); white space where they meet belongs to what follows, and is split with it."""
    before = tokenizer(text.rstrip())["input_ids"]
    targets = tokenizer(text + following)["input_ids"][len(before) :]
    values, greedy = token_log_likelihoods(model, before, targets)
    return values.sum().item(), greedy


def whole_text(model, tokenizer, text, window):
    """log p(text) after the end-of-text token, in windows; the last one is filled up with what was predicted before."""
    ids = tokenizer(text)["input_ids"]
    total = 0.0
    for start in range(0, len(ids), window):
        end = min(start + window, len(ids))
        before = [tokenizer.eos_token_id] if start == 0 else ids[max(end - window - 1, 0) : start]
        total += token_log_likelihoods(model, before, ids[start:end])[0].sum().item()
    return total


def written(model, tokenizer, text, tokens, stop):
    """The likeliest tokens one after the other, each from a forward pass of its own without a cache."""
    ids = tokenizer(text)["input_ids"]
    prompt = len(ids)
    while len(ids) < prompt + tokens and (len(ids) == prompt or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tokenizer.decode(ids[prompt:], skip_special_tokens=True).split(stop)[0]


def requests(kind, arguments):
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_log_likelihoods(tokenizer, num_streams, batch_size, dtype):
    model = build(num_streams, dtype)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    pairs = [(document["code"], line) for document in documents("next_line") for line in document["lines"]]
    expected = [continuation(model, tokenizer, *pair) for pair in pairs]
    measured = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [value for value, _ in measured] == pytest.approx([value for value, _ in expected], **TOLERANCE[dtype])
    assert [greedy for _, greedy in measured] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == {True, False}


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_rolling_log_likelihoods(tokenizer, num_streams, batch_size, dtype):
    model = build(num_streams, dtype)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=WINDOW)
    texts = [document["text"] for document in documents("prose")]
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) > 2 * WINDOW
    measured = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    expected = [whole_text(model, tokenizer, text, WINDOW) for text in texts]
    assert measured == pytest.approx(expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_contexts_run_with_one_row_where_streams_share_keys(tokenizer, batch_size):
    """As lm-eval's own class has it; only what it reads of answers runs with all streams."""
    model = build(3, torch.float64, kv="shared").eval()
    pairs = [("def f(x):\n    return", following) for following in (" x", " x + 1", " None")]
    pairs += [("def f(x):\n    return x", " + 1")]  # a row of the same tokens, with a shorter answer
    pairs += [("import os\nimport sys\n\n\ndef main():", "\n    print(os.getcwd())")]
    options = {"tokenizer": tokenizer, "backend": "causal", "batch_size": batch_size, "max_length": WINDOW}
    theirs, ours = HFLM(pretrained=model, **options), harness_model(model, **options)
    expected, shapes = theirs.loglikelihood(requests("loglikelihood", pairs)), []
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    found = ours.loglikelihood(requests("loglikelihood", pairs))
    hook.remove()
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    first, second = shapes[::2], shapes[1::2]
    assert all(rows <= batch_size for rows, _ in first)
    assert all(after == 2 * rows and 0 < n < S for (rows, S), (after, n) in zip(first, second, strict=True))
    long = [("x = 1\n" * 40,)]  # several windows
    whole = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", long))[0] for lm in (ours, theirs)]
    assert whole[0] == pytest.approx(whole[1], rel=1e-9)


@pytest.mark.parametrize("num_streams", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_generation(tokenizer, num_streams):
    """The same text alone, and padded on the left beside longer ones."""
    model = build(num_streams)
    prompts = [document["beginning"] for document in documents("rest_of_line")]
    lengths = {len(tokenizer(prompt)["input_ids"]) for prompt in prompts}
    assert len(lengths) > 4
    expected = [written(model, tokenizer, prompt, 12, "\n") for prompt in prompts]
    for batch_size in (1, 8):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
        given = requests("generate_until", [(prompt, options) for prompt in prompts])
        assert lm.generate_until(given, disable_tqdm=True) == expected


def by_hand(model, tokenizer):
    """The metrics of the three tasks."""
    choices, prose, rest = documents("next_line"), documents("prose"), documents("rest_of_line")
    right = right_by_length = 0
    for document in choices:
        values = [continuation(model, tokenizer, document["code"], line)[0] for line in document["lines"]]
        by_length = [value / len(line) for value, line in zip(values, document["lines"], strict=True)]
        right += values.index(max(values)) == document["right"]
        right_by_length += by_length.index(max(by_length)) == document["right"]
    nats = -sum(whole_text(model, tokenizer, document["text"], 1024) for document in prose)
    size = sum(len(document["text"].encode()) for document in prose)
    words = sum(len(document["text"].split()) for document in prose)
    exact = sum(written(model, tokenizer, document["beginning"], 12, "\n") == document["rest"] for document in rest)
    return {
        ("next_line", "acc"): right / len(choices),
        ("next_line", "acc_norm"): right_by_length / len(choices),
        ("prose", "word_perplexity"): math.exp(nats / words),
        ("prose", "byte_perplexity"): math.exp(nats / size),
        ("prose", "bits_per_byte"): nats / size / math.log(2),
        ("rest_of_line", "exact_match"): exact / len(rest),
    }


@pytest.mark.parametrize("streams", ["default", pytest.param("other", marks=pytest.mark.nightly), "off"])
def test_tasks(tokenizer, streams):
    """Of the active set, of another, and of none: then the figures are those of a model that was never wrapped.

    By day another set is measured by the command, see tests/cli/test_eval.py.
    """
    model = build(4)
    model.set_streams(None if streams == "off" else streams)
    results = evaluate_tasks(model, tokenizer, FILES)
    figures = {(task, metric): value for task, metric, _, value, _ in scores(results)}
    expected = by_hand(build(None) if streams == "off" else model, tokenizer)
    assert figures == pytest.approx(expected, rel=1e-5)
    stamped = {name: results["parscale"][name] for name in ("num_streams", "streams")}
    assert stamped == {"num_streams": {"default": 4, "other": 2, "off": 1}[streams], "streams": streams}
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_group_and_examples_before_each_question(tokenizer, tmp_path, own_tasks, every):
    """By name, from a folder of one's own; the group has the mean over those tasks that have the metric."""
    if not every:
        own_tasks(of_hellaswag)
    for path in TASKS.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "lines.yaml").write_text(
        "group: lines\ntask:\n  - next_line\n  - rest_of_line\n"
        "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true, filter_list: none}\n"
    )
    results = evaluate_tasks(build(None), tokenizer, ["lines"], include_path=tmp_path, num_fewshot=1, limit=4)
    figures = {(task, metric): value for task, metric, _, value, _ in scores(results)}
    assert figures["lines", "acc"] == figures["next_line", "acc"]
    assert results["n-shot"] == {"lines": 1, "next_line": 1, "rest_of_line": 1}
    assert results["config"]["limit"] == 4


def test_the_model_is_left_as_it_was(tokenizer):
    model = build(4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_tasks(model, tokenizer, [FILES[0]], limit=1)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_tasks_print_goes_to_standard_error(tokenizer, tmp_path, capsys):
    (tmp_path / "documents.py").write_text(
        (TASKS / "documents.py").read_text().replace("    documents =", "    print('loud')\n    documents =")
    )
    for name in ("prose.yaml", "prose.jsonl"):
        (tmp_path / name).write_text((TASKS / name).read_text())
    evaluate_tasks(build(None), tokenizer, [str(tmp_path / "prose.yaml")], limit=1)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "loud" in printed.err


def test_stamp():
    model = build(4)
    assert stamp(model, lm_eval="1") == {
        "num_streams": 4,
        "streams": "default",
        "versions": {name: version(name) for name in ("parscale", "torch", "transformers")} | {"lm_eval": "1"},
    }
    model.set_streams(None)
    assert stamp(model)["streams"] == stamp(build(None))["streams"] == "off"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("task: [", "cannot be loaded: ParserError"),
        ("task: alone", "cannot be loaded"),
        ("group: several\ntask: [prose]", "describes a group; give its folder"),
        ("task: \udce4", "is not text in UTF-8"),
    ],
)
def test_bad_task_files(tokenizer, tmp_path, text, complaint):
    path = tmp_path / "task.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=complaint):
        evaluate_tasks(build(None), tokenizer, [str(path)])


def test_code_runs_only_when_it_was_allowed(tokenizer, tmp_path):
    for name in ("prose.jsonl", "documents.py"):
        (tmp_path / name).write_text((TASKS / name).read_text())
    path = tmp_path / "prose.yaml"
    path.write_text(Path(FILES[1]).read_text() + "unsafe_code: true\n")
    with pytest.raises(
        ValueError, match=r"prose would run code .*: allow it by --confirm-run-unsafe-code, in a sandbox\."
    ):
        evaluate_tasks(build(None), tokenizer, [str(path)], limit=1)
    assert scores(evaluate_tasks(build(None), tokenizer, [str(path)], limit=1, confirm_run_unsafe_code=True))


def test_a_task_that_the_model_is_too_short_for(tokenizer):
    with pytest.raises(ValueError, match=r"lm-eval cannot run .*must be less than model's maximum sequence length"):
        evaluate_tasks(build(None), tokenizer, [FILES[2]], sequence_length=12)


def test_no_task(tokenizer):
    with pytest.raises(ValueError, match="No task was given"):
        evaluate_tasks(build(None), tokenizer, [])


def test_without_lm_eval(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"Tasks need the package lm-eval: pip install 'parscale\[eval\]'"):
        evaluate_tasks(build(None), tokenizer, FILES)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_recipes(caplog, own_tasks, every):
    """Each is a group by its file's name, of tasks that lm-eval knows, and hides none of lm-eval's own.

    By day lm-eval reads those of its files that have one of the names on a line of its own, as a task, group or tag.
    """
    recipes = {path.stem: path for path in RECIPES.iterdir() if not path.stem.startswith("halueval_")}
    assert recipes.keys() == {"general", "math", "code", "hallucination"}
    if not every:
        listed = re.findall(r"^ *- *(\w+) *$", "\n".join(path.read_text() for path in recipes.values()), re.MULTILINE)
        line = rf"^\W*((task|group|tag)\W+)?({'|'.join([*recipes, *listed])})\W*$"
        own_tasks(lambda path: re.search(line, path.read_text(), re.MULTILINE))
    manager = TaskManager(include_path=RECIPES)
    assert "overrides" not in caplog.text
    for name, path in recipes.items():
        entry = manager.task_index[name]
        assert entry.yaml_path == path
        group = GroupConfig(**entry.cfg)
        assert group.group == name
        assert group.task
        assert set(group.task) <= {*manager.all_groups, *manager.all_subtasks} - recipes.keys()


HALUEVAL = {  # rows as the data set has them, in words of our own
    "halueval_qa": [
        {"knowledge": "The lake is deep.", "question": "Is it deep?", "answer": "It is", "hallucination": "no"},
        {"knowledge": "The lake is deep.", "question": "Where is it?", "answer": "In Peru", "hallucination": "yes"},
    ],
    "halueval_dialogue": [
        {"knowledge": "Ada reads.", "dialogue_history": "Does she?", "response": "Yes.", "hallucination": "no"},
        {"knowledge": "Ada reads.", "dialogue_history": "What?", "response": "Dante.", "hallucination": "yes"},
    ],
    "halueval_summarization": [
        {"document": "Rain fell for a day.", "summary": "It rained.", "hallucination": "no"},
        {"document": "Rain fell for a day.", "summary": "It snowed.", "hallucination": "yes"},
    ],
}


@pytest.mark.parametrize("name", HALUEVAL)
def test_halueval_asks_about_the_row_and_scores_the_likelier_word(tokenizer, tmp_path, own_tasks, name):
    """Its own file, but for where the rows come from."""
    own_tasks(of_hellaswag)
    recipe = (RECIPES / f"{name}.yaml").read_text()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HALUEVAL[name]))
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{data: {tmp_path / 'rows.jsonl'}}}\n"
    local = re.sub(r"dataset_path: .*\ndataset_name: .*\n", source, recipe).replace(name, f"local_{name}")
    (tmp_path / "local.yaml").write_text(local)
    model = build(4)
    found = evaluate_tasks(model, tokenizer, [str(tmp_path / "local.yaml")])
    template = yaml.safe_load(recipe)["doc_to_text"]
    right = []
    for row in HALUEVAL[name]:
        text = re.sub(r"{{(\w+)}}", lambda field, row=row: row[field[1]], template)
        assert all(value in text for key, value in row.items() if key != "hallucination")
        no, yes = (continuation(model, tokenizer, text, f" {word}")[0] for word in ("no", "yes"))
        right.append((yes > no) == (row["hallucination"] == "yes"))
    assert [value for _, metric, _, value, _ in scores(found) if metric == "acc"] == [sum(right) / 2]


@contextlib.contextmanager
def errors_for_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("how", ["a file", "a folder"])
def test_task_files_that_can_run_code_are_named_before_they_do(tokenizer, tmp_path, own_tasks, how):
    """lm-eval calls what a file names by `!function` while it reads the file."""
    own_tasks(of_hellaswag)
    ran = tmp_path / "ran"
    (tmp_path / "trap.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ValueError('it ran')\n")
    path = tmp_path / "trap.yaml"
    path.write_text("task: trap\noutput_type: loglikelihood_rolling\ncustom_dataset: !function trap.load\n")
    given, options = (path, {}) if how == "a file" else ("trap", {"include_path": tmp_path})
    with errors_for_warnings(), pytest.raises(UserWarning, match=r"run-unsafe-code: read .*It names trap\.load"):
        evaluate_tasks(build(None), tokenizer, [str(given)], limit=1, **options)
    assert not ran.exists()
    with pytest.warns(UserWarning, match="lm-eval runs code"), pytest.raises(ValueError, match="it ran"):
        evaluate_tasks(build(None), tokenizer, [str(given)], limit=1, **options)
    assert ran.exists()
