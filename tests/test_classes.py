"""Every model class of transformers takes streams, or is refused in one line and left as it was.

`benchmarks/classes.py` goes through all of them; here, of each kind of task, one class for each verdict.
"""

import json
from pathlib import Path

import pytest
import transformers
from scripts import load_script

import parscale

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "classes.json").read_text())
OTHERS = ("LayoutLMv3Model", "PixioBackbone", "VJEPA2Model")  # of boxes, of states before the last norm, of videos
PINNED = transformers.__version__ == RECORDED["versions"]["transformers"]


*_, classes = map(load_script, ("tiny_models", "tiny_inputs", "promises", "support", "classes"))


def sample():
    """Of each task, the first class that takes streams and, at night, the first that is refused; and `OTHERS`."""
    chosen = {}
    for names in classes.tasks().values():
        for verdict, marks in ((classes.REFUSED, [pytest.mark.nightly]), (classes.TAKES, [])):
            known = [name for name in names if RECORDED["classes"].get(name, {}).get("verdict") == verdict]
            chosen |= {name: pytest.param(name, marks=marks) for name in known[:1]}
    chosen |= {name: pytest.param(name) for name in OTHERS}
    return [chosen[name] for name in sorted(chosen)]


@pytest.mark.parametrize("name", sample())
def test_a_class_takes_streams_or_is_refused(name):
    found = classes.examine(name)
    assert found.verdict in (classes.TAKES, classes.REFUSED), found.reason
    if PINNED:
        assert found.verdict == RECORDED["classes"][name]["verdict"], found.reason


def test_none_breaks():
    assert classes.BROKEN not in RECORDED["counts"]
    assert RECORDED["counts"][classes.TAKES] > 800


@pytest.mark.skipif(not PINNED, reason="the file is of another transformers")
def test_the_file_has_every_class():
    assert sorted(RECORDED["classes"]) == sorted({name for names in classes.tasks().values() for name in names})
    assert (ROOT / "docs" / "classes.md").read_text() == classes.page(RECORDED)
    counted = classes.results({name: classes.Verdict(**found) for name, found in RECORDED["classes"].items()})
    assert counted | {"versions": RECORDED["versions"]} == RECORDED


@pytest.mark.parametrize(
    ("what", "breaking"),
    [
        ("mode", lambda model: model.train()),
        ("returns something else", lambda model: next(model.parameters()).data.add_(1)),
        ("number of hooks", lambda model: model.register_forward_hook(lambda *args: None)),
        ("configuration object", lambda model: setattr(model, "config", type(model.config)(**model.config.to_dict()))),
        ("attribute", lambda model: setattr(model, "parscale", None)),
    ],
)
def test_a_refusal_that_leaves_a_trace_is_seen(what, breaking, monkeypatch):
    def refuse(model, *args, **options):
        breaking(model)
        raise parscale.UnsupportedModelError("no")

    monkeypatch.setattr(parscale, "wrap", refuse)
    found = classes.examine("BertModel")
    assert found.verdict == classes.BROKEN
    assert what in found.reason


def test_a_refusal_is_one_line():
    for name in ("Wav2Vec2ForCTC", "ConvNextModel", "MambaModel", "PeAudioModel"):
        if not hasattr(transformers, name):
            continue
        with pytest.raises(parscale.UnsupportedModelError) as caught:
            parscale.wrap(classes.build(name), 2, prefix_length=2, init="random")
        assert "\n" not in str(caught.value)
        assert type(caught.value) is parscale.UnsupportedModelError
