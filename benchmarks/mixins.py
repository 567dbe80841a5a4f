"""transformers' own model tests on wrapped models: which pass on the plain model and not on the wrapped one, and why.

    pip download --no-binary :all: --no-deps transformers==5.23.0 -d build
    tar -xzf build/transformers-5.23.0.tar.gz -C build
    python benchmarks/mixins.py build/transformers-5.23.0

needs `pip install parameterized`. Each test of `ModelTesterMixin` (and of `GenerationTesterMixin`, where the
source has it; a source distribution does not) runs on a small random model as its class makes it, and then on one that
is wrapped as soon as it is made or loaded, once for each P and each `kv`. The exit code is 1 if a test fails on a
wrapped model alone and is not listed here with a reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import signal
import sys
import tempfile
import types
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import parscale
from parscale.auto import ParScaleModel

RESULTS = Path(__file__).with_name("results") / "mixins.json"
SECONDS = 120  # for one test
ROWS, LENGTH = 3, 7
STREAMS = {"prefix_length": 3, "init": "random", "seed": 0}

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}

_COLUMNS = "attention weights have one column more for each token of the prefix"
# Tests that should fail on a wrapped model: patterns of the name and of what the test says, and why.
EXPECTED = (
    ("^test_attention_outputs$", "Lists differ", _COLUMNS),
    ("^test_sliding_window_mask$", "shape of the mask", _COLUMNS),
    (
        "^test_batching_equivalence$",
        "encoder_last_hidden_state",
        "an encoder's output has P rows for each source, stream-major",
    ),
    (
        "^test_retain_grad_hidden_states_attentions$",
        "unexpectedly None",
        'with `kv="shared"` the attention weights are those of several calls joined for the caller; the output does '
        "not go through the joined tensor, so its retained gradient stays `None`",
    ),
    (
        "^test_model_weights_reload_no_missing_tied_weights$",
        "has no prefix_k",
        "it takes all weights out of a saved folder, and one that should hold streams and has none is refused",
    ),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Classes of one architecture, and the configuration that their tests are run with."""

    config: str
    classes: tuple[str, ...]
    options: dict[str, Any]

    @property
    def reads_twice(self) -> bool:
        """Whether it is an encoder with a decoder."""
        return self.config.startswith("T5")


FAMILIES = {
    "llama": Family("LlamaConfig", ("LlamaModel", "LlamaForCausalLM"), GROUPED),
    "qwen2": Family("Qwen2Config", ("Qwen2Model", "Qwen2ForCausalLM"), GROUPED),
    "gpt2": Family(
        "GPT2Config",
        ("GPT2Model", "GPT2LMHeadModel"),
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mixtral": Family(
        "MixtralConfig",
        ("MixtralModel", "MixtralForCausalLM"),
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        ("Gemma3TextModel", "Gemma3ForCausalLM"),
        GROUPED | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    ),
    "opt": Family(
        "OPTConfig",
        ("OPTModel", "OPTForCausalLM"),
        {key: value for key, value in SIZES.items() if key != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": Family("BertConfig", ("BertModel", "BertForMaskedLM", "BertForSequenceClassification"), SIZES),
    "t5": Family(
        "T5Config",
        ("T5Model", "T5ForConditionalGeneration"),
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
}


class ModelTester:
    """What the mixins ask of a model's own tests.

    Args:
        family: whose configuration and inputs.
        case: the test case, which asserts.
    """

    batch_size, seq_length, is_training = ROWS, LENGTH, True
    encoder_seq_length = decoder_seq_length = key_length = LENGTH
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, family: Family, case: unittest.TestCase) -> None:
        self.family = family
        self.parent = case

    def get_config(self) -> Any:
        """A new configuration."""
        return getattr(transformers, self.family.config)(**self.family.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A configuration, and inputs of random tokens that are no special ones."""
        inputs = {"input_ids": torch.randint(3, 99, (ROWS, LENGTH)), "attention_mask": torch.ones(ROWS, LENGTH).long()}
        if self.family.reads_twice:
            inputs |= {f"decoder_{name}": value.clone() for name, value in inputs.items()}
        return self.get_config(), inputs

    def prepare_config_and_inputs_for_model_class(self, model_class: type) -> tuple[Any, dict[str, torch.Tensor]]:
        """The same for every class."""
        return self.prepare_config_and_inputs_for_common()


class Wrapping:
    """While it is on, every model of some classes is wrapped as soon as it is made or loaded."""

    def __init__(self, classes: list[type], **streams: Any) -> None:
        self.classes = classes
        self.streams = STREAMS | streams
        self.depth = 0  # of constructors, or of a loader, that run

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Patches the classes in this block."""
        own = {cls: (cls.__dict__.get("__init__"), cls.__dict__.get("from_pretrained")) for cls in self.classes}
        for cls in self.classes:
            cls.__init__ = self._wrapped_after(cls.__init__)
            cls.from_pretrained = classmethod(self._loaded_by(cls.from_pretrained.__func__))
        try:
            yield
        finally:
            for cls, (init, loader) in own.items():
                for name, function in (("__init__", init), ("from_pretrained", loader)):
                    if function is None:
                        delattr(cls, name)
                    else:
                        setattr(cls, name, function)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[bool]:
        self.depth += 1
        try:
            yield self.depth == 1
        finally:
            self.depth -= 1

    def _wrapped_after(self, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def construct(model: Any, *args: Any, **kwargs: Any) -> None:
            with self._inside() as outermost:
                init(model, *args, **kwargs)
                if outermost and type(model) in self.classes:
                    parscale.wrap(model, **self.streams)

        return construct

    def _loaded_by(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(cls: type, *args: Any, **kwargs: Any) -> Any:
            with self._inside() as outermost:
                path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
                if outermost and _holds_streams(cls, path):
                    return ParScaleModel.from_pretrained(*args, **kwargs)
                result = loader(cls, *args, **kwargs)
                model = result[0] if isinstance(result, tuple) else result
                if outermost:
                    parscale.wrap(model, **self.streams)
            return result

        return load


def _holds_streams(cls: type, path: Any) -> bool:
    """Whether a folder is of this class with streams."""
    config = None if path is None else Path(path, "config.json")
    names = json.loads(config.read_text()).get("architectures") if config is not None and config.exists() else None
    return bool(names) and "ParScale" in names[0] and names[0].replace("ParScale", "") == cls.__name__


def mixins_of(source: Path) -> tuple[list[type], list[str]]:
    """The mixins of a source tree, and the modules that it lacks and that are stood in for by empty classes."""
    package = types.ModuleType("tests")
    package.__path__ = [str(source / "tests")]
    sys.modules["tests"] = package
    absent = []
    for module, name in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        if not (source / "tests" / (module.replace(".", "/") + ".py")).exists():
            folder = module.split(".")[0]
            sys.modules[f"tests.{folder}"] = types.ModuleType(f"tests.{folder}")
            sys.modules[f"tests.{module}"] = stand_in = types.ModuleType(f"tests.{module}")
            setattr(stand_in, name, type(name, (), {}))
            absent.append(name)
    common = importlib.import_module("tests.test_modeling_common")
    found = [common.ModelTesterMixin]
    if "GenerationTesterMixin" not in absent:
        found.append(importlib.import_module("tests.generation.test_utils").GenerationTesterMixin)
    return found, absent


def case_of(family: Family, mixins: list[type]) -> type[unittest.TestCase]:
    """The test case of a family."""

    def set_up(case: Any) -> None:
        torch.manual_seed(0)
        case.model_tester = ModelTester(family, case)

    members = {
        "all_model_classes": tuple(getattr(transformers, name) for name in family.classes),
        "is_encoder_decoder": family.reads_twice,
        "setUp": set_up,
    }
    return type("Case", (*mixins, unittest.TestCase), members)


def outcome_of(case: unittest.TestCase) -> str:
    """`"passes"`, `"skipped"` or what went wrong, in one line."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    result = unittest.TestResult()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        case.run(result)
    finally:
        signal.alarm(0)
    problems = result.failures + result.errors
    if problems:
        lines = [
            line for line in problems[0][1].strip().splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)
        ]
        message = (lines or problems[0][1].strip().splitlines())[-1]
        return re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "FOLDER", message)[:300]
    return "skipped" if result.skipped else "passes"


def run_all(case: type[unittest.TestCase], names: Iterable[str]) -> dict[str, str]:
    """The outcome of each test."""
    return {name: outcome_of(case(name)) for name in names}


def examine(family: Family, mixins: list[type], grid: list[dict[str, Any]], only: str) -> dict[str, Any]:
    """Outcomes on the plain model, and for each set of streams those that differ on the wrapped one."""
    case = case_of(family, mixins)
    plain = run_all(case, (name for name in unittest.TestLoader().getTestCaseNames(case) if re.search(only, name)))
    passing = [name for name, outcome in plain.items() if outcome == "passes"]
    outcomes = list(plain.values())
    result: dict[str, Any] = {
        "tests": len(plain),
        "do not apply to the plain model": outcomes.count("skipped"),
        "fail on the plain model": {k: v for k, v in plain.items() if v not in ("passes", "skipped")},
        "wrapped": [],
    }
    for streams in grid:
        with Wrapping([getattr(transformers, name) for name in family.classes], **streams).on():
            wrapped = run_all(case, passing)
        result["wrapped"].append(
            streams
            | {
                "pass": list(wrapped.values()).count("passes"),
                "skipped": [name for name, outcome in wrapped.items() if outcome == "skipped"],
                "fail": {k: v for k, v in wrapped.items() if v not in ("passes", "skipped")},
            }
        )
    return result


def reason_of(test: str, outcome: str) -> str | None:
    """Why a test should fail like this on a wrapped model; `None` if it should not."""
    return next((why for name, text, why in EXPECTED if re.search(name, test) and re.search(text, outcome)), None)


def earlier_families(output: Path, versions: dict[str, Any]) -> dict[str, Any]:
    """The families that an earlier run with the same versions has examined."""
    earlier = json.loads(output.read_text()) if output.exists() else {}
    families: dict[str, Any] = earlier.pop("families", {})
    return families if earlier == versions else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of transformers' source, with its tests")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--num-streams", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--kv", nargs="+", choices=("own", "shared"), default=["own", "shared"])
    parser.add_argument("--only", default="", help="a regular expression for the tests' names")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not (args.source / "tests" / "test_modeling_common.py").exists():
        parser.error(
            f"{args.source} has no tests/test_modeling_common.py: unpack a source distribution of transformers"
        )
    if importlib.util.find_spec("parameterized") is None:
        parser.error("transformers' tests need a package that is not installed: pip install parameterized")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    mixins, absent = mixins_of(args.source)
    grid = [{"num_streams": count, "kv": kv} for kv in args.kv for count in args.num_streams]
    results: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__, "absent": absent}
    results["families"] = earlier_families(args.output, results)
    unexpected = 0
    for name in args.families:
        found = results["families"][name] = examine(FAMILIES[name], mixins, grid, args.only)
        for row in found["wrapped"]:
            print(f"{name} P = {row['num_streams']} {row['kv']}: {row['pass']} tests pass on both")
            for test, outcome in row["fail"].items():
                why = reason_of(test, outcome)
                unexpected += why is None
                row["fail"][test] = {"outcome": outcome, "reason": why}
                print(f"  {'UNEXPECTED' if why is None else 'expected  '} {test}: {outcome}", flush=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
