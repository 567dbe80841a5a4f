"""Runs wrapped models whose layers are on two devices, and writes how far each result is from the CPU's.

    several_devices.py OUTPUT

The devices are pretended, so that this has to be a process of its own.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "parscale")]

import pretended_devices  # noqa: E402
import torch  # noqa: E402
from accelerate import dispatch_model  # noqa: E402
from conftest import FAMILIES, T, fill_streams, token_ids  # noqa: E402
from model_calls import GREEDY  # noqa: E402

import parscale  # noqa: E402

FIRST, SECOND = f"{pretended_devices.NAME}:0", f"{pretended_devices.NAME}:1"
KINDS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "prompt": {"transform": "prompt"},
    "lora": {"transform": "lora"},
    "shared": {"kv": "shared"},
}
CASES = [("llama", kind) for kind in KINDS] + [("gemma3", "prefix"), ("gemma3", "shared"), ("qwen3_next", "prefix")]


def placed(model: Any) -> Any:
    """The model with embeddings and the first half of the layers on one device, and all else on another."""
    decoder, names = model.get_decoder(), {id(module): name for name, module in model.named_modules()}
    half = len(decoder.layers) // 2
    units = {names[id(layer)]: FIRST if number < half else SECOND for number, layer in enumerate(decoder.layers)}
    units[names[id(model.get_input_embeddings())]] = FIRST
    for name, module in model.named_modules():
        if not list(module.children()) and not name.startswith(tuple(units)):
            units[name] = SECOND
    return dispatch_model(model, units, main_device=SECOND, force_hooks=True)


def calls(device: str, kind: str) -> dict[str, Callable[[Any], torch.Tensor]]:
    """What is asked of each model, by name, with inputs on a device."""
    ids = token_ids().to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def in_pieces(model: Any) -> torch.Tensor:
        first = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
        return torch.cat([first.logits, rest.logits], dim=1)

    def without_streams(model: Any) -> torch.Tensor:
        with model.use_streams(None):
            return model(input_ids=ids).logits

    def of_each_stream(model: Any) -> torch.Tensor:
        report = model.stream_report(ids)
        return torch.cat([report.losses.cpu(), report.weights.cpu().flatten(), report.correlation.cpu().flatten()])

    adaptive = {"adaptive": 2.0} if kind == "shared" else {}
    return {
        "logits": lambda model: model(input_ids=ids, attention_mask=mask).logits,
        "loss": lambda model: model(input_ids=ids, attention_mask=mask, labels=ids).loss,
        "in pieces": in_pieces,
        "generate": lambda model: model.generate(ids, attention_mask=mask, **GREEDY | adaptive),
        "without streams": without_streams,
        "of each stream": of_each_stream,
    }


@torch.no_grad()
def differences(family: str, kind: str) -> Iterator[tuple[str, float | str]]:
    """By call, the largest difference between two devices and the CPU, or what failed."""

    def wrapped(model: Any) -> Any:
        parscale.wrap(model, 3, prefix_length=T, init="random", seed=0, **KINDS[kind])
        fill_streams(model)
        return model

    here = wrapped(FAMILIES[family].build("sdpa"))
    if kind == "lora":  # its trial differentiates, which works on one of these devices only
        there = placed(wrapped(FAMILIES[family].build("sdpa")))
    else:
        there = wrapped(placed(FAMILIES[family].build("sdpa")))
    expected = calls("cpu", kind)
    for device in (FIRST, SECOND) if family == "llama" else (SECOND,):  # of the inputs
        for name, call in calls(device, kind).items():
            try:
                found = call(there).cpu().double()
            except Exception as error:
                yield f"{device}-{name}", f"{type(error).__name__}: {error}"
            else:
                yield f"{device}-{name}", float((found - expected[name](here).double()).abs().max())


def main(output: Path) -> None:
    library = pretended_devices.register()
    found = {
        f"{family}-{kind}-{name}": difference
        for family, kind in CASES
        for name, difference in differences(family, kind)
    }
    output.write_text(json.dumps(found))
    del library


if __name__ == "__main__":
    main(Path(sys.argv[1]))
