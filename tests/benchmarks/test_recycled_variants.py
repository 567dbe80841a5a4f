"""Variants of one cache on the small model: how they start, which tokens they see, and how they are trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

import parscale
from parscale.checkpoints import train as train_checkpoint

pytestmark = pytest.mark.usefixtures("evidence")
WORDS = [(str(number), f"def number_{number}(x):\n    return x + {number}\n" * 40) for number in range(60)]
VARIANTS = ("shared-own", "shared-window=3", "shared-prefix")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with little text and short sequences."""
    import recycling

    monkeypatch.setattr(recycling, "_training", lambda tokens: WORDS)
    monkeypatch.setattr(recycling, "SEQUENCE_LENGTH", 32)
    monkeypatch.setattr(recycling, "PREFIX_LENGTH", 4)
    return recycling


def _opened(small: Any, kv: str, folder: Path, arm: str = "frozen") -> tuple[Any, Any]:
    import recycled_variants

    run = small.RecycleRun(arm, 2, 1280, 0, 4e-4 if arm != "frozen" else 0.0, 0.16, kv=kv)
    folder.mkdir(exist_ok=True)
    start = small._start(run, folder)
    first_text = small._texts_of_streams(run, AutoTokenizer.from_pretrained(start))[-1:]
    return run, recycled_variants.open_variant(kv, start, 2, first_text, frozen=arm == "frozen")


def test_a_run_of_a_variant_has_a_name_of_its_own(small: Any) -> None:
    runs = [small.RecycleRun("frozen", 4, 1000, 0, kv=kv) for kv in ("shared", *VARIANTS)]
    assert [run.name.partition("-s0-")[2] for run in runs] == [
        "shared",
        "shared-own",
        "shared-window3",
        "shared-prefix",
    ]


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_in_one_row_do_not_see_each_other(small: Any, variant: str, tmp_path: Path) -> None:
    _, opened = _opened(small, variant, tmp_path)
    model = opened.model.double().eval()
    for gate in opened.gates_of_streams:
        gate.fill_(1.0)
    ids = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(7), *range(5)], [*range(3), *range(9)]])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for row, cut in ((0, 7), (1, 3)):
        apart = [model(input_ids=part, use_cache=False).logits for part in ids[row : row + 1].split([cut, 12 - cut], 1)]
        torch.testing.assert_close(packed[row], torch.cat(apart, 1)[0], rtol=1e-5, atol=1e-5)
    alone = model(input_ids=ids, use_cache=False).logits
    assert (packed[0, 7:] - alone[0, 7:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_window_begins_closed(small: Any, tmp_path: Path) -> None:
    """So that a backbone which never had it starts next to streams without it."""
    _, opened = _opened(small, "shared-window=3", tmp_path)
    shared = parscale.load(tmp_path / "start")
    ids = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    expected, found = shared(ids).logits, opened.model(input_ids=ids, use_cache=False).logits
    assert 0 < (found - expected).abs().mean() < 0.05 * expected.std()
    for gate in opened.gates_of_streams:
        gate.fill_(-torch.inf)
    torch.testing.assert_close(opened.model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_prefix_of_stream_0_starts_from_the_last_text(small: Any, tmp_path: Path) -> None:
    """As that of a stream with keys of its own does."""
    _, opened = _opened(small, "shared-prefix", tmp_path)
    own = small.RecycleRun("frozen", 2, 1280, 0)
    (tmp_path / own.name).mkdir()
    layers = parscale.load(small._start(own, tmp_path / own.name)).get_decoder().layers
    for prefix, layer in zip(opened.first_prefixes, layers, strict=True):
        torch.testing.assert_close(prefix[0], layer.self_attn.prefix_k[1:])
        torch.testing.assert_close(prefix[1], layer.self_attn.prefix_v[1:])


@pytest.mark.parametrize("arm", ["frozen", "streams-and-backbone"])
def test_the_steps_are_those_of_parscale_train(small: Any, arm: str, tmp_path: Path) -> None:
    """Streams that share a cache as the package has it, trained by both, come to the same weights."""
    import recycled_variants
    from variants import Streams

    run, _ = _opened(small, "shared-prefix", tmp_path, arm)
    run = replace(run, kv="shared", streams_rate=0.01, aggregator_rate=0.003)
    settings = replace(small._settings(run, tmp_path), warmup=0.3, decay=0.4)
    start = tmp_path / "start"
    train_checkpoint(str(start), tmp_path / "trained", settings, console=Console(quiet=True))
    expected = parscale.load(tmp_path / "trained").state_dict()
    model = parscale.load(start)
    if arm == "frozen":
        model.freeze_backbone()
    else:
        model.requires_grad_(True)
    recycled_variants.fit(Streams(model, 2), AutoTokenizer.from_pretrained(start), WORDS, settings)
    moved = parscale.load(start).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
        assert arm == "frozen" or not torch.equal(value, moved[name]), name
    assert any(not torch.equal(value, moved[name]) for name, value in expected.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_variant_adds_trains_and_a_frozen_backbone_does_not(small: Any, variant: str, tmp_path: Path) -> None:
    import recycled_variants
    from loop import is_of_streams

    run, opened = _opened(small, variant, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in opened.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    recycled_variants.fit(opened, tokenizer, WORDS, small._settings(run, tmp_path))
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, before[name]) == (not is_of_streams(name)), name
