"""Every attribute that the plugin reads from an object of vLLM's is one that vLLM's own class has."""

import ast
import dataclasses
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "parscale" / "integrations" / "vllm"
BACKENDS, MODELS, CONFIG = "vllm.v1.attention.backends", "vllm.model_executor.models", "vllm.config"
CONFIGS = {
    "vllm_config": f"{CONFIG}.VllmConfig",
    "model_config": f"{CONFIG}.ModelConfig",
    "cache_config": f"{CONFIG}.CacheConfig",
    "compilation_config": f"{CONFIG}.CompilationConfig",
    "load_config": f"{CONFIG}.LoadConfig",
    "parallel_config": f"{CONFIG}.ParallelConfig",
    "scheduler_config": f"{CONFIG}.SchedulerConfig",
    "speculative_config": f"{CONFIG}.SpeculativeConfig",
}
METADATA = [f"{BACKENDS}.cpu_attn.CPUAttentionMetadata", f"{BACKENDS}.flash_attn.FlashAttentionMetadata"]
ATTENTIONS = [f"{MODELS}.{x}" for x in ("llama.LlamaAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention")]
# In each file, by class or function ("" in all of it): a name, and the classes of the objects that it stands for.
NAMES = {
    "windows.py": {
        "WindowCpuImpl": {"attn_metadata": [METADATA[0]]},
        "WindowFlashImpl": {"attn_metadata": [METADATA[1]]},
    },
    "cached_attention.py": {
        "Sequences": {"attn_metadata": METADATA},
        "FlashCache": {"attn_metadata": [METADATA[1]]},
    },
    "shared_attention.py": {"SharedKeys": {"attn_metadata": METADATA}},
    "shared_models.py": {
        "_SharedForCausalLM": {"metadata": METADATA},
        "_no_graph": {"context": ["vllm.forward_context.ForwardContext"]},
        "_share_keys": {"own": ATTENTIONS, "attn": ["vllm.model_executor.layers.attention.Attention"]},
    },
    "model_state.py": {
        "StreamState": {
            "input_batch": ["vllm.v1.worker.gpu.input_batch.InputBatch"],
            "new_req_data": ["vllm.v1.core.sched.output.NewRequestData"],
        }
    },
    "sampling.py": {
        "": {
            "sampling_params": ["vllm.sampling_params.SamplingParams"],
            "batch_update": ["vllm.v1.sample.logits_processor.BatchUpdate"],
        }
    },
    "models.py": {
        "StreamAttention": {
            "own": ATTENTIONS,
            "attn": ["vllm.model_executor.layers.attention.Attention"],
        }
    },
    "scheduler.py": {
        "": {
            "request": ["vllm.v1.request.Request"],
            "sampling": ["vllm.sampling_params.SamplingParams"],
            "sampling_params": ["vllm.sampling_params.SamplingParams"],
            "stats": ["vllm.v1.metrics.stats.PrefillStats"],
            "model_runner_output": ["vllm.v1.outputs.ModelRunnerOutput"],
            "output": ["vllm.v1.engine.EngineCoreOutput"],
            "one": ["vllm.v1.engine.EngineCoreOutputs"],
        }
    },
    "startup.py": {},
}


def load(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def attributes(cls):
    """What objects of a class have: fields, members, and what its methods set."""
    found = set(dir(cls)) | set(getattr(cls, "__struct_fields__", ()))
    if dataclasses.is_dataclass(cls):
        found |= {field.name for field in dataclasses.fields(cls)}
    for base in cls.__mro__[:-1]:
        found |= set(vars(base).get("__annotations__", {}))
        if base.__module__.startswith(("vllm.", "parscale.")):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            found |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            }
    return found


def reads(tree, names):
    """`(name, attribute, classes)` for each attribute that is read from a known object, through local names too."""
    names = names | {name: [path] for name, path in CONFIGS.items()}

    def known(node):
        """The classes of what an expression stands for: by its last name, or one that was given to it."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            return names.get(node.attr) if node.attr in CONFIGS or known(node.value) else None
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=True) if several else [(target, value)]
            for one, other in pairs:
                if isinstance(one, ast.Name) and known(other):
                    names[one.id] = known(other)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and known(node.value):
            yield ast.unparse(node.value), node.attr, known(node.value)


def parts(file):
    """Each class and function of a file, with the names that are known in it."""
    for node in ast.parse((PLUGIN / file).read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node, NAMES[file].get("", {}) | NAMES[file].get(node.name, {})


@pytest.mark.parametrize("file", NAMES)
def test_every_attribute_is_there(file):
    found = [read for node, names in parts(file) for read in reads(node, names)]
    assert len(found) > 2
    missing = {
        f"{name}.{attribute} of {path}"
        for name, attribute, paths in found
        for path in paths
        if attribute not in attributes(load(path))
    }
    assert not missing


def test_an_attribute_that_is_not_there_is_found():
    """The one that a release took away and a stand-in went on having."""
    tree = ast.parse("def forward(attn_metadata):\n    metadata = attn_metadata\n    return metadata.use_cascade")
    path = f"{BACKENDS}.flash_attn.FlashAttentionMetadata"
    (read,) = reads(tree, {"attn_metadata": [path]})
    assert read == ("metadata", "use_cascade", [path])
    assert "use_cascade" not in attributes(load(path))
    assert "num_actual_tokens" in attributes(load(path))


@pytest.mark.parametrize(
    "name",
    [
        "windows.WindowCpuImpl",
        "windows.WindowFlashImpl",
        "shared_attention.SharedCpuImpl",
        "shared_attention.SharedFlashImpl",
    ],
)
def test_what_an_implementation_reads_of_itself(name):
    cls = load(f"parscale.integrations.vllm.{name}")
    own = [base for base in cls.__mro__ if base.__module__.startswith("parscale.")]
    read = {
        node.attr
        for base in own
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base))))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert {"scale", "head_size", "sliding_window", "prefix"} <= read
    assert read <= attributes(cls)


def test_what_the_state_of_a_model_reads_of_itself():
    """Model Runner V2's, which Model Runner V1 does not import."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    assert {"max_num_reqs", "model", "device", "add_request", "prepare_inputs"} <= attributes(DefaultModelState)
