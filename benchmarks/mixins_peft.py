"""PEFT's own tests of decoder models on wrapped ones: which pass on the plain model and not with streams, and why.

    pip download --no-binary :all: --no-deps peft==0.21.2 -d build
    tar -xzf build/peft-0.21.2.tar.gz -C build
    HF_HUB_OFFLINE=1 python benchmarks/mixins_peft.py build/peft-0.21.2

needs `pip install parameterized`. PEFT's tests load small models from the Hub; here a small random model in a local
folder stands for each: as it is, and with frozen streams (they would train beside an adapter, and tests of training
assert that nothing else has a gradient), once for each P and each `kv`. The exit code is 1 if a test fails
on a wrapped model alone and is not listed here with a reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import linecache
import sys
import tempfile
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from outcomes import row_of, unexpected
from transformers import AutoModelForCausalLM

import parscale

RESULTS = Path(__file__).with_name("results") / "mixins_peft.json"
STREAMS = {"prefix_length": 3, "init": "random", "seed": 0}
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # so that small changes of a layer show in the logits
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
# What stands for a model of the Hub.
MODELS = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", SIZES),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2Config", SIZES),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3TextConfig", SIZES | {"head_dim": 8}),
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTConfig",
        {key: value for key, value in SIZES.items() if key not in ("intermediate_size", "num_key_value_heads")}
        | {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.25},
    ),
}
# Tests that should fail on a wrapped model: patterns of the name and of what the test says, and why.
EXPECTED = (
    (
        "ShadowConfig",
        "does not support streams",
        "SHADOW is refused: its second, smaller model reads B rows, but the layers of P streams have P*B",
    ),
)


class Outcomes:
    """Records what each test does."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the first that is not a success, in one line."""
        name = report.nodeid.split("::", 1)[-1]
        if report.skipped:
            self.outcomes[name] = "skipped"
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(crash.message if crash else report.longrepr).splitlines()[0]
            line = linecache.getline(crash.path, crash.lineno).strip() if crash else ""
            self.outcomes[name] = (f"{said}: {line}" if line.startswith("assert") else said)[:300]
        elif report.when == "call":
            self.outcomes.setdefault(name, "passes")


def prepare_imports(source: Path) -> None:
    """Makes the tests a package, and gives them a class of diffusers that those of decoder models do not use."""
    package = types.ModuleType("tests")
    package.__path__ = [str(source / "tests")]
    sys.modules["tests"] = package
    if importlib.util.find_spec("diffusers") is None:
        sys.modules["diffusers"] = stand_in = types.ModuleType("diffusers")
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})


def save_models(folder: Path, names: list[str], streams: dict[str, Any]) -> dict[str, str]:
    """A folder for each model; with streams, if there are any."""
    saved = {}
    for name in names:
        kind, options = MODELS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))
        if streams:
            parscale.wrap(model, **STREAMS, **streams)
        saved[name] = str(folder / name)
        model.save_pretrained(saved[name])
    return saved


def run_tests(source: Path, names: list[str], streams: dict[str, Any], only: str) -> dict[str, str]:
    """The outcome of each test of these models."""
    recorder = Outcomes()
    own = AutoModelForCausalLM.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        saved = save_models(Path(folder), names, streams)

        def load(name: str, *args: Any, **kwargs: Any) -> Any:
            model = own(saved.get(name, name), *args, **kwargs)
            return model.requires_grad_(False) if streams else model

        chosen = " or ".join(name.split("/")[-1] for name in names)
        options = ["-q", "--no-header", "--tb=no", "--import-mode=importlib", "-p", "no:cacheprovider"]
        options += ["-p", "no:xdist", "-o", "addopts=", "-W", "ignore"]
        options += ["-k", f"({chosen}) and ({only})" if only else chosen, "--rootdir", str(source)]
        tests = str(source / "tests" / "test_decoder_models.py")
        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", load):
            code = pytest.main([*options, tests], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code!r}")
    return recorder.outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of PEFT's source, with its tests")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--num-streams", nargs="+", type=int, default=[2])
    parser.add_argument("--kv", nargs="+", choices=("own", "shared"), default=["own", "shared"])
    parser.add_argument("--only", default="", help="an expression for the tests' names, as pytest -k")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not (args.source / "tests" / "test_decoder_models.py").exists():
        parser.error(f"{args.source} has no tests/test_decoder_models.py: unpack a source distribution of PEFT")
    if importlib.util.find_spec("parameterized") is None:
        parser.error("PEFT's tests need a package that is not installed: pip install parameterized")
    prepare_imports(args.source)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    plain = run_tests(args.source, args.models, {}, args.only)
    counts = Counter(plain.values())
    results: dict[str, Any] = {"peft": peft.__version__, "transformers": transformers.__version__}
    results |= {"torch": torch.__version__, "models": args.models, "only": args.only, "tests": len(plain)}
    results["do not apply to the plain model"] = counts["skipped"]
    results["fail on the plain model"] = {k: v for k, v in plain.items() if v not in ("passes", "skipped")}
    results["wrapped"] = []
    for kv in args.kv:
        for count in args.num_streams:
            streams = {"num_streams": count, "kv": kv}
            outcomes = run_tests(args.source, args.models, streams, args.only)
            wrapped = {name: outcome for name, outcome in outcomes.items() if plain.get(name) == "passes"}
            results["wrapped"].append(row_of(streams, wrapped, EXPECTED))
            args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["wrapped"], indent=2))
    return int(any(map(unexpected, results["wrapped"])))


if __name__ == "__main__":
    sys.exit(main())
