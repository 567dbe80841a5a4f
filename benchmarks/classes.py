"""Every model class of every `AutoModelFor...` of transformers, built tiny: it takes streams, or is refused cleanly.

    python benchmarks/classes.py --output docs/classes.md --jobs 2

writes the page, and the same for programs beside the other results.

A class that takes streams returns what the plain model returns, in the same shapes, with a loss where the plain one has
a loss, and the plain model's numbers to the last bit after `unwrap`. One that is refused raises
`parscale.UnsupportedModelError`, and the model is afterwards what it was. `support.py` holds the causal language
models to more.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import inspect
import json
import multiprocessing
import signal
import warnings
from pathlib import Path
from typing import Any

import tiny_inputs
import tiny_models
import torch
import transformers
from promises import one_line
from support import quiet
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.utils.generic import ModelOutput

import parscale

RESULTS = Path(__file__).with_name("results") / "classes.json"
TAKES, REFUSED, BROKEN = "takes streams", "refused", "broken"
NOT_BUILT, NO_INPUT = "cannot be built tiny", "no input found"
LARGEST = 30_000_000  # parameters of a model that is still tiny enough
SECONDS = 120  # for one class
INSIDE = ("hidden_states", "attentions", "past_key_values", "cache", "router_logits", "encoder_last_hidden_state")


@dataclasses.dataclass
class Verdict:
    """What was found for a class.

    Attributes:
        verdict: one of the words above.
        reason: why.
        loss: whether a loss was compared.
    """

    verdict: str
    reason: str = ""
    loss: bool = False


def tasks() -> dict[str, list[str]]:
    """The classes of each mapping of the installed transformers, by what the mapping is for."""
    found = {}
    for name in dir(modeling_auto):
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            values = getattr(modeling_auto, name).values()
            classes = {cls for value in values for cls in ((value,) if isinstance(value, str) else value)}
            found[name.removesuffix("MAPPING_NAMES").strip("_")] = sorted(classes)
    return found


def build(name: str) -> Any:
    """A tiny random model of a class, in eval mode; the same weights each time.

    Raises:
        Exception: whatever transformers does with the small configuration, or a `ValueError` for one that is large.
    """
    cls = getattr(transformers, name)
    config = tiny_models.tiny_config(cls.config_class, 6, tiny_models.SPECIAL.get(name, {}))
    if getattr(config, "is_decoder", False) and name not in tiny_models.names():
        config.is_decoder = False
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in inspect.getsource(inspect.getmodule(cls)):
        rope["mrope_section"] = [2, 1, 1]  # of times, rows and columns: half a head
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters, the configuration's small sizes notwithstanding")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config)
        tiny_models.randomize(model)
    return model.eval()


def examine(name: str) -> Verdict:
    """Builds a tiny model of a class, and wraps it."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _examine(name)
    except TooLong:
        return Verdict(NOT_BUILT, f"not done in {SECONDS} s")
    finally:
        signal.alarm(0)


class TooLong(BaseException):
    """No `Exception`: what parscale tries of a model would take it for the model's."""


def _too_long(*args: Any) -> None:
    raise TooLong


def _examine(name: str) -> Verdict:
    try:
        model = build(name)
    except Exception as error:  # whatever it is, it is not parscale's
        return Verdict(NOT_BUILT, f"{type(error).__name__}: {one_line(error)}")
    arguments, plain = next(runs(model), ({}, None))
    before = state_of(model)
    try:
        parscale.wrap(model, 3, prefix_length=3, init="random", seed=0)
    except parscale.UnsupportedModelError as error:
        changed = [what for what, value in state_of(model).items() if value != before[what]]
        if changed:
            return Verdict(BROKEN, f"refused, and it has another {', '.join(changed)}")
        if plain is not None and not same(plain, run(model, arguments)):
            return Verdict(BROKEN, "refused, and it returns something else")
        return Verdict(REFUSED, one_line(error))
    except Exception as error:
        return Verdict(BROKEN, f"wrap raises {type(error).__name__}: {one_line(error)}")
    if plain is None:
        return Verdict(NO_INPUT, f"streams in {type(model.parscale.backbone).__name__}")
    return _compare(model, arguments, plain)


def _compare(model: Any, arguments: dict[str, Any], plain: dict[str, torch.Tensor]) -> Verdict:
    """A wrapped model against what the plain one returned."""
    with torch.no_grad():
        for tensor in model.parscale.tensors(model.parscale.active).values():
            tensor.normal_(std=0.5)
    try:
        mixed = run(model, arguments)
    except Exception as error:
        return Verdict(BROKEN, f"with streams it raises {type(error).__name__}: {one_line(error)}")
    shapes, expected = ({name: tuple(x.shape) for name, x in found.items()} for found in (mixed, plain))
    if shapes != expected:
        return Verdict(BROKEN, f"it returns {shapes}, not {expected}")
    unmoved = [name for name, tensor in plain.items() if torch.equal(tensor, mixed[name])]
    results = [name for name in plain if "logits" in name or name.endswith("_embeds")]
    if model.can_generate():  # what it says of an image is no result
        results = [name for name in results if name == "logits"]
    if len(unmoved) == len(plain) and "logits" not in plain:
        return Verdict(NO_INPUT, f"that reaches {type(model.parscale.backbone).__name__}, where streams are mixed")
    if len(unmoved) == len(plain) or 0 < len(set(results) & set(unmoved)) < len(results):
        return Verdict(BROKEN, f"streams do not change {', '.join(unmoved)}")
    labels = tiny_inputs.labels_for(model, plain)
    model.set_streams(None)
    own = next(runs(model, [arguments | labels]), ({}, {}))[1] if labels else {}
    model.set_streams("default")
    if "loss" in own:
        try:
            loss = run(model, arguments | labels)["loss"]
        except Exception as error:
            return Verdict(BROKEN, f"its loss raises {type(error).__name__}: {one_line(error)}")
        if loss.shape != own["loss"].shape or not loss.isfinite().all():
            return Verdict(BROKEN, f"its loss is {loss}")
    parscale.unwrap(model)
    if not same(plain, run(model, arguments)):
        return Verdict(BROKEN, "after unwrap it returns something else")
    return Verdict(TAKES, loss="loss" in own)


def runs(model: Any, candidates: Any = None) -> Any:
    """Arguments that the model takes, and the tensors that it returns."""
    for arguments in tiny_inputs.candidates(model) if candidates is None else candidates:
        try:
            yield arguments, run(model, arguments)
        except Exception:  # not what it takes
            continue


@torch.no_grad()
def run(model: Any, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a model returns by their names, the same at each call; without those of its inside."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tensors_of(model(**arguments))


def tensors_of(output: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of an output, those of the outputs in it included."""
    found = {}
    for name, value in output.items():
        if any(word in name for word in INSIDE):
            continue
        if isinstance(value, torch.Tensor):
            found[path + name] = value
        elif isinstance(value, ModelOutput):
            found |= tensors_of(value, f"{path}{name}.")
        elif isinstance(value, tuple | list):
            found |= {f"{path}{name}.{i}": x for i, x in enumerate(value) if isinstance(x, torch.Tensor)}
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are the same to the last bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(x.nan_to_num(), expected[name].nan_to_num()) for name, x in found.items()
    )


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a refusal may not change, in a form that can be compared."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_pre_hooks")
    hooks += ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    return {
        "class": {name: type(module) for name, module in modules.items()},
        "attribute": {name: sorted(vars(module)) for name, module in modules.items()},
        "configuration object": {name: id(vars(module).get("config")) for name, module in modules.items()},
        "configuration": str(getattr(model, "config", None)),
        "number of hooks": {name: [len(getattr(module, hook)) for hook in hooks] for name, module in modules.items()},
        "mode": {name: module.training for name, module in modules.items()},
        "parameter": {
            name: (id(x), x._version, x.requires_grad, x.grad is None) for name, x in model.named_parameters()
        },
        "buffer": {name: (id(x), float(x.nan_to_num().double().sum())) for name, x in model.named_buffers()},
        "random state": torch.get_rng_state().tolist(),
    }


def results(verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """What goes into the file."""
    versions = {"parscale": parscale.__version__, "torch": str(torch.__version__).split("+")[0]}
    counts = {}
    for task, names in tasks().items():
        found = collections.Counter(verdicts[name].verdict for name in names if name in verdicts)
        counts[task] = dict(sorted(found.items()))
    classes = {
        name: {key: value for key, value in dataclasses.asdict(verdict).items() if value}
        for name, verdict in sorted(verdicts.items())
    }
    return {
        "versions": versions | {"transformers": transformers.__version__},
        "counts": dict(collections.Counter(verdict.verdict for verdict in verdicts.values())),
        "tasks": counts,
        "classes": classes,
    }


def page(found: dict[str, Any]) -> str:
    """The counts in Markdown, and the reasons of refusals, from `results`."""
    by_version = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    verdicts = [verdict for verdict in (TAKES, REFUSED, BROKEN, NOT_BUILT, NO_INPUT) if verdict in found["counts"]]
    lines = [
        "# Which model classes take streams",
        "",
        f"Made by `make support` with {by_version}.",
        "",
        "Every class of every `AutoModelFor...` of transformers, built tiny, wrapped with prefixes and called as its",
        "users call it. *Takes streams*: it returns the plain model's shapes, has a loss where the plain one has one,",
        "and after `unwrap` the plain model's numbers to the last bit. *Refused*: `UnsupportedModelError`, and the",
        "model is what it was. *No input found*: it was wrapped, and the script knows no input that the plain model",
        "takes.",
        "[architectures.md](architectures.md) holds the causal language models to more.",
        "",
        f"| task | {' | '.join(verdicts)} |",
        "|---|" + "---|" * len(verdicts),
    ]
    for task, counts in [*sorted(found["tasks"].items()), ("all, each class once", found["counts"])]:
        name = task.removeprefix("MODEL_FOR_").replace("_", " ").lower()
        lines.append(f"| {name} | " + " | ".join(str(counts.get(verdict, "")) for verdict in verdicts) + " |")
    reasons = collections.defaultdict(list)
    for name, verdict in found["classes"].items():
        if verdict["verdict"] == REFUSED:
            reasons[verdict["reason"].replace(name, "this class")].append(name)
    lines += ["", "## Why classes are refused", ""]
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"- {reason} ({', '.join(f'`{name}`' for name in names)})")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes, and nothing is written")
    parser.add_argument("--output", type=Path, help="the page to write, and beside the other results the same as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="classes at once")
    arguments = parser.parse_args()
    names = arguments.only or sorted({name for names in tasks().values() for name in names})
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context, initializer=quiet) as pool:
        verdicts = {}
        for name, verdict in zip(names, pool.map(examine, names, chunksize=8), strict=True):
            verdicts[name] = verdict
            if arguments.only or verdict.verdict == BROKEN:
                print(name, verdict.verdict, verdict.reason, sep="; ", flush=True)
    found = results(verdicts)
    print(*(f"{number} {verdict}" for verdict, number in sorted(found["counts"].items())), sep=", ")
    if arguments.output is not None and not arguments.only:
        arguments.output.write_text(page(found), encoding="utf-8")
        RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
