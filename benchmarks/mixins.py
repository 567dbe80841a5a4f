"""transformers' own model tests on wrapped models: which pass on the plain model and not on the wrapped one, and why.

    pip download --no-binary :all: --no-deps transformers==5.23.0 -d build
    tar -xzf build/transformers-5.23.0.tar.gz -C build
    python benchmarks/mixins.py build/transformers-5.23.0

needs `pip install parameterized`. Each test of `ModelTesterMixin` (and of `GenerationTesterMixin`, where the
source has it; a source distribution does not) runs twice: on a small random model as its class makes it, and on one
that is wrapped as soon as it is made or loaded. The exit code is 1 if a test fails on the wrapped model alone and is
not listed here with a reason.
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
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import parscale

RESULTS = Path(__file__).with_name("results") / "mixins.json"
SECONDS = 120  # for one test
ROWS, LENGTH = 3, 7
STREAMS = {"num_streams": 2, "prefix_length": 3, "init": "random", "seed": 0}

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
# Tests that should fail on a wrapped model: in which families, and why.
EXPECTED = {
    "test_attention_outputs": (("llama", "qwen2", "gpt2", "mixtral", "gemma3", "bert", "t5"), _COLUMNS),
    "test_sliding_window_mask": (("qwen2", "mixtral"), _COLUMNS),
    "test_batching_equivalence": (("t5",), "an encoder's output has P rows for each source, stream-major"),
    "test_model_weights_reload_no_missing_tied_weights": (
        ("llama", "qwen2", "gpt2", "mixtral", "gemma3", "bert", "t5"),
        "it takes all weights out of a saved folder, and one that should hold streams and has none is refused",
    ),
}


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

    def __init__(self, classes: list[type]) -> None:
        self.classes = classes
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
                    parscale.wrap(model, **STREAMS)

        return construct

    def _loaded_by(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(cls: type, *args: Any, **kwargs: Any) -> Any:
            with self._inside() as outermost:
                path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
                reader = _reader_of_streams(cls, path) if outermost else None
                if reader is not None:
                    return reader.from_pretrained(*args, **kwargs)
                result = loader(cls, *args, **kwargs)
                model = result[0] if isinstance(result, tuple) else result
                if outermost:
                    parscale.wrap(model, **STREAMS)
            return result

        return load


def _reader_of_streams(cls: type, path: Any) -> Any:
    """What reads a folder of this class with streams; `None` for any other folder."""
    config = None if path is None else Path(path, "config.json")
    names = json.loads(config.read_text()).get("architectures") if config is not None and config.exists() else None
    if not names or "ParScale" not in names[0] or names[0].replace("ParScale", "") != cls.__name__:
        return None
    transformers.AutoConfig.from_pretrained(path)  # makes the name known
    return getattr(transformers, names[0])


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
        return (lines or problems[0][1].strip().splitlines())[-1][:300]
    return "skipped" if result.skipped else "passes"


def examine(family: Family, mixins: list[type], only: str) -> dict[str, Any]:
    """Counts, and for each test that passes on the plain model and not on the wrapped one, what it says there."""
    case = case_of(family, mixins)
    wrapping = Wrapping([getattr(transformers, name) for name in family.classes])
    passed, failed = 0, {}
    for name in unittest.TestLoader().getTestCaseNames(case):
        if not re.search(only, name) or outcome_of(case(name)) != "passes":
            continue
        with wrapping.on():
            outcome = outcome_of(case(name))
        if outcome == "passes":
            passed += 1
        elif outcome != "skipped":
            failed[name] = outcome
    return {"pass on both": passed, "fail on the wrapped model": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of transformers' source, with its tests")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
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
    results: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__, "absent": absent}
    results |= {"expected": {test: reason for test, (_, reason) in EXPECTED.items()}, "families": {}}
    unexpected = 0
    for name in args.families:
        found = examine(FAMILIES[name], mixins, args.only)
        results["families"][name] = found
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{name}: {found['pass on both']} tests pass on both")
        for test, outcome in found["fail on the wrapped model"].items():
            expected = name in EXPECTED.get(test, ((), ""))[0]
            unexpected += not expected
            print(f"  {'expected  ' if expected else 'UNEXPECTED'} {test}: {outcome}", flush=True)
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
