"""Tiny models, saved and exported once for all tests, and a loop over ONNX Runtime that knows nothing of parscale."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parscale

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HALF = "tensor(float16)"
GRANITE = {"embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 3.0}


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Caches what a function returns, and takes a default for the same whether it is given or left out."""
    results: dict[tuple[Any, ...], Any] = {}
    signature = inspect.signature(make)

    def made(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        if bound.args not in results:
            results[bound.args] = make(*bound.args)
        return results[bound.args]

    return made


class Runtime:
    """A decoder in ONNX Runtime, known by the names and shapes of its inputs alone."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def cache(self, rows: int) -> dict[str, Any]:
        """An empty one."""
        dtypes = {name: np.float16 if each.type == HALF else np.float32 for name, each in self.inputs.items()}
        return {
            name: np.zeros((rows, each.shape[1], 0, each.shape[3]), dtypes[name])
            for name, each in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def step(self, ids: Any, mask: Any, cache: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Logits `(B, S, V)`, and the cache with the new tokens."""
        results = self.session.run(None, {"input_ids": ids, "attention_mask": mask, **cache})
        named = dict(zip(self.outputs, results, strict=True))
        return named.pop("logits"), {name.replace("present", "past_key_values"): x for name, x in named.items()}

    def greedy(self, ids: Any, mask: Any, steps: int) -> Any:
        """`(B, N + steps)`: as often the likeliest token."""
        cache, new, found = self.cache(len(ids)), ids, ids
        for _ in range(steps):
            logits, cache = self.step(new, mask, cache)
            new = logits[:, -1].argmax(-1)[:, None]
            mask = np.concatenate([mask, np.ones_like(new)], axis=1)
            found = np.concatenate([found, new], axis=1)
        return found

    def loss(self, ids: Any) -> float:
        """Nats per token of rows without padding, `(B, N)`."""
        logits, _ = self.step(ids, np.ones_like(ids), self.cache(len(ids)))
        flat = torch.from_numpy(logits[:, :-1].astype(np.float32)).flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(flat, torch.from_numpy(ids[:, 1:]).flatten()))


@pytest.fixture(scope="session")
def runtime() -> type[Runtime]:
    return Runtime


@pytest.fixture(scope="session")
def saved(tmp_path_factory, zoo) -> Callable[..., tuple[Any, Path]]:
    """Makes a model of a family with P streams, and a checkpoint of it; each once.

    Of two layers; Llama, which most tests take, of one: an export of it takes half the time.
    """

    @once
    def make(family: str, P: int, kv: str = "own", transform: str = "prefix") -> tuple[Any, Path]:
        families = zoo.FAMILIES | {"granite": zoo.Family("Granite", GRANITE)}
        sizes = {"max_position_embeddings": 1024} | ({"num_hidden_layers": 1} if family == "llama" else {})
        model = families[family].build(families[family].attention[-1], **sizes)
        if P > 1:
            options = {"prefix_length": zoo.T, "init": "random", "kv": kv, "transform": transform}
            parscale.wrap(model, P, **options)
            zoo.fill_streams(model)
        folder = tmp_path_factory.mktemp("saved") / "model"
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory, saved) -> Callable[..., tuple[Any, Path]]:
    """The same with its export; each once."""
    from parscale.export.onnx import export_onnx

    @once
    def make(family: str, P: int, kv: str = "own", dtype: str = "float32") -> tuple[Any, Path]:
        model, folder = saved(family, P, kv)
        output = tmp_path_factory.mktemp("exported") / "output"
        export_onnx(str(folder), output, dtype=dtype)
        return model, output

    return make
