"""What the plugin takes for granted of vLLM is in vLLM's sources: names, attributes, parameters.

Those of the installed version, and at night those of another one: its build for GPUs cannot be imported without their
libraries, but read (`make test-vllm-sources`).
"""

import ast
import importlib
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import nn
from vllm_sources import Parameters, Sources, declared, stored

from parscale.compat import vllm as compat
from parscale.integrations.vllm.startup import BACKENDS as SERVED

PLUGIN = Path(__file__).parents[2] / "parscale" / "integrations" / "vllm"
FOLDER = Path(find_spec("vllm").origin).parent  # of the installed version
BACKENDS, MODELS, CONFIG = "vllm.v1.attention.backends", "vllm.model_executor.models", "vllm.config"
CONFIGS = {
    "vllm_config": f"{CONFIG}.VllmConfig",
    "model_config": f"{CONFIG}.ModelConfig",
    "cache_config": f"{CONFIG}.CacheConfig",
    "compilation_config": f"{CONFIG}.CompilationConfig",
    "device_config": f"{CONFIG}.DeviceConfig",
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
        "PagedFlashAttention": {"attn_metadata": [METADATA[1]]},
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
    "startup.py": {"_keep_sums_apart": {"passes": [f"{CONFIG}.PassConfig"]}},
    "../../compat/vllm.py": {"put_in_front": {"request": ["vllm.v1.request.Request"]}},
}


def path_of(name):
    """Where vLLM has one of compat's names."""
    module, _, own_name = compat._MODULES[name].partition(":")
    return f"{module}.{own_name or name}"


def names_of_vllm(tree):
    """The names that a file of the plugin takes from compat."""
    module = "parscale.compat.vllm"
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == module]
    return {alias.name for node in nodes for alias in node.names} & set(compat._MODULES)


TREES = {path.name: ast.parse(path.read_text()) for path in sorted(PLUGIN.glob("*.py"))}
OF_VLLM = {file: names_of_vllm(tree) for file, tree in TREES.items()}
NODES = [(file, node) for file, tree in TREES.items() for node in tree.body]
CLASSES = {node.name: (file, node) for file, node in NODES if isinstance(node, ast.ClassDef)}


def hierarchy(name):
    """A class of the plugin with its bases: the plugin's own, and the paths of vLLM's."""
    file, node = CLASSES[name]
    own, theirs = [node], []
    for base in map(ast.unparse, node.bases):
        if base in CLASSES:
            further, paths = hierarchy(base)
            own, theirs = own + further, theirs + paths
        elif base in OF_VLLM[file]:
            theirs.append(path_of(base))
    return own, theirs


BASES = {ast.unparse(base) for _, node in CLASSES.values() for base in node.bases}
DERIVED = sorted(name for name in CLASSES if hierarchy(name)[1] and name not in BASES)


@pytest.fixture(scope="module", params=["installed", pytest.param("given", marks=pytest.mark.nightly)])
def sources(request):
    """A version of vLLM, to be read."""
    if request.param == "installed":
        return Sources(FOLDER)
    folder = request.config.getoption("vllm_sources", None)
    if folder is None:
        pytest.skip("needs --vllm-sources FOLDER, the package of another version of vLLM")
    return Sources(folder)


def test_every_name_is_there(sources):
    for name in compat._MODULES:
        sources.find(path_of(name))


def test_every_backend_is_there(sources):
    assert set(SERVED) <= sources.attributes(path_of("AttentionBackendEnum"))


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
def test_every_attribute_is_there(sources, file):
    found = [read for node, names in parts(file) for read in reads(node, names)]
    assert len(found) > 2
    missing = {
        f"{name}.{attribute} of {path}"
        for name, attribute, paths in found
        for path in paths
        if attribute not in sources.attributes(path)
    }
    assert not missing


@pytest.mark.parametrize("file", [file for file in TREES if OF_VLLM[file]])
def test_every_attribute_of_a_class_is_there(sources, file):
    """Such as a member of an enumeration."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OF_VLLM[file]:
            assert node.attr in sources.attributes(path_of(node.value.id)), ast.unparse(node)


@pytest.mark.parametrize("file", [file for file in TREES if OF_VLLM[file]])
def test_every_call_fits(sources, file):
    """Of what compat has of vLLM."""
    faults = {}
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OF_VLLM[file]:
            faults[ast.unparse(node)] = sources.parameters(path_of(node.func.id)).faults(node)
    assert not any(faults.values()), faults


def in_vllm(sources, paths, method):
    """The parameters of a method in the first of these classes that has it."""
    return next(filter(None, (sources.method(path, method) for path in paths)), None)


MADE_BY_US = {"_Qwen2", "_Qwen3", "_Llama", "_Mistral"}  # and called by the plugin's models alone


@pytest.mark.parametrize("name", sorted({*DERIVED} - MADE_BY_US))
def test_a_method_in_place_of_vllms_takes_what_that_takes(sources, name):
    own, paths = hierarchy(name)
    faults = {}
    for node in (node for cls in own for node in cls.body if isinstance(node, ast.FunctionDef)):
        theirs = in_vllm(sources, paths, node.name)
        if theirs is not None:
            faults[node.name] = Parameters.of(node, is_method=True).refused(theirs)
    assert not any(faults.values()), faults


@pytest.mark.parametrize("name", DERIVED)
def test_every_call_of_vllms_own_method_fits(sources, name):
    own, paths = hierarchy(name)
    faults = {}
    for node in (node for cls in own for node in ast.walk(cls) if isinstance(node, ast.Call)):
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "super()":
            theirs = in_vllm(sources, paths, node.func.attr)
            faults[ast.unparse(node)] = theirs.faults(node) if theirs is not None else []
    assert not any(faults.values()), faults


@pytest.mark.parametrize("name", DERIVED)
def test_what_an_object_reads_of_itself_is_there(sources, name):
    """By a method, by vLLM's class, or set by another part of the plugin; to announce it is not to have it."""
    own, paths = hierarchy(name)
    has = set().union(*map(stored, own), *(declared(node, bare=False) for node in own), *map(sources.attributes, paths))
    if any(ast.unparse(base) == "nn.Module" for node in own for base in node.bases):
        has |= set(dir(nn.Module))
    has |= {"prefix", "num_streams", "aggregate_layer"}  # set by the layer and by the model that hold them
    read = {
        node.attr
        for cls in own
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    assert read <= has, read - has


def test_an_attribute_that_is_not_there_is_found():
    """The one that a release took away and a stand-in went on having."""
    tree = ast.parse("def forward(attn_metadata):\n    metadata = attn_metadata\n    return metadata.use_cascade")
    path = f"{BACKENDS}.flash_attn.FlashAttentionMetadata"
    (read,) = reads(tree, {"attn_metadata": [path]})
    assert read == ("metadata", "use_cascade", [path])
    found = Sources(FOLDER).attributes(path)
    assert "use_cascade" not in found
    assert "num_actual_tokens" in found


def of(code):
    """The parameters of a method."""
    return Parameters.of(ast.parse(code).body[0], is_method=True)


@pytest.mark.parametrize(
    ("call", "faults"),
    [
        ("f(1, b=2, c=3)", []),
        ("f(1, *rest)", []),
        ("f(**rest)", []),
        ("f(1, 2)", ["c is not given"]),
        ("f(1, 2, 3, c=4)", ["3 values for 2 parameters"]),
        ("f(1, 2, c=3, d=4)", ["no parameter d"]),
    ],
)
def test_a_call_that_does_not_fit_is_found(call, faults):
    assert of("def f(self, a, b=0, *, c): ...").faults(ast.parse(call, mode="eval").body) == faults


@pytest.mark.parametrize(
    ("own", "faults"),
    [
        ("def f(self, a, b, c): ...", []),
        ("def f(self, *others, **further): ...", []),
        ("def f(self, a, x, c): ...", ["x in place of b", "x is not given"]),
        ("def f(self, a, b): ...", ["c is not taken"]),
        ("def f(self, a): ...", ["b is not taken", "c is not taken"]),
        ("def f(self, a, b, c, d): ...", ["d is not given"]),
    ],
)
def test_a_method_that_takes_something_else_is_found(own, faults):
    assert of(own).refused(of("def f(self, a, b=0, *, c): ...")) == faults


def test_what_is_read_is_what_is_imported():
    """Of the installed version: no class has more when it is read, and functions have the same parameters."""
    installed = Sources(FOLDER)
    tables = [names.values() for of_file in NAMES.values() for names in of_file.values()]
    paths = {path for table in tables for several in table for path in several} | set(CONFIGS.values())
    for path in sorted({*paths, *(path for name in DERIVED for path in hierarchy(name)[1])}):
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        members = {name for each in cls.__mro__ for name in (*vars(each), *vars(each).get("__annotations__", ()))}
        members |= set(getattr(cls, "__struct_fields__", ())) | set(getattr(cls, "__dataclass_fields__", ()))
        assert set().union(*(declared(node) for _, node in installed.bases(path))) <= members, path
    for name in ("Attention", "ColumnParallelLinear", "ParallelLMHead", "merge_attn_states", "set_weight_attrs"):
        found, expected = installed.parameters(path_of(name)), inspect.signature(getattr(compat, name)).parameters
        named = {x.name for x in expected.values() if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)}
        assert {*found.positional, *found.keywords} == named, name
