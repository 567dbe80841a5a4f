"""Full checkpoints of tiny models, what transformers answers with them, and vLLM's engine on them in one process.

These tests run in an environment of their own, with vLLM (`make test-vllm`).
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import parscale

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:  # and not for the other tests, which meet this file too: read by vLLM when it is imported
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
VOCABULARY = 256
CACHE_BYTES = 2**27  # of keys and values: more than the tests' requests fill, and quickly allocated


def pytest_addoption(parser):
    parser.addoption("--vllm-sources", type=Path, help="the package of another version of vLLM, to be read")


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """Makes full checkpoints, each once: a family's tiny model in float32 with P streams that differ."""
    made = {}

    def make(family, num_streams, *, prefix_length=16, kv="own", **fields):
        key = (family, num_streams, prefix_length, kv, *sorted(fields.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("full") / f"{family}-{num_streams}"
            model = make_tiny(family, **fields)
            parscale.wrap(model, num_streams, prefix_length=prefix_length, init="random", kv=kv)
            fill_streams(model)
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def serving():
    """The functions of this file, for tests to call."""
    return SimpleNamespace(
        agree=agree,
        built=built,
        configured=configured,
        engine=engine,
        greedy=greedy,
        prompts=prompts,
        reference=reference,
    )


@pytest.fixture(scope="session")
def tiny():
    """Makes tiny models."""
    return make_tiny


@pytest.fixture(scope="session")
def fill():
    """Gives streams values."""
    return fill_streams


def make_tiny(family, **fields):
    """A model of two layers with weights that matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | fields
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(noise, alpha=0.3)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def fill_streams(model):
    """Streams that differ, and an aggregator that prefers some."""
    for name, parameter in model.parscale.tensors(model.parscale.active).items():
        scale = 1.0 if "prefix" in name else 0.3 if parameter.ndim == 1 else 3 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn_like(parameter) * scale)


def prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def reference(folder, ids, new, **arguments):
    """What `generate` answers to one prompt, greedily: the new tokens, and the log-probability of each."""
    model = folder if isinstance(folder, torch.nn.Module) else parscale.load(folder, dtype=torch.float32).eval()
    whole = torch.tensor([ids])
    out = model.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    tokens = out.sequences[0, len(ids) :]
    logits = torch.cat(out.logits).double()
    return tokens.tolist(), logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()


SETTINGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": CACHE_BYTES,
}


def configured(folder, **arguments):
    """What vLLM makes of a checkpoint and its settings before it starts anything."""
    from vllm.engine.arg_utils import EngineArgs

    with quickly():
        return EngineArgs(str(folder), **SETTINGS | arguments).create_engine_config()


@contextmanager
def built(folder, **arguments) -> Iterator:
    """vLLM's model of a checkpoint, without an engine around it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port

    config = configured(folder, **arguments)
    cleanup_dist_env_and_memory()  # of an engine in this process, in another file
    try:
        with pytest.MonkeyPatch.context() as patched, quickly(), set_current_vllm_config(config):
            patched.setattr(torch.accelerator, "empty_cache", nothing)  # as vLLM's worker does on a CPU
            init_distributed_environment(1, 0, get_distributed_init_method("127.0.0.1", get_open_port()), 0, "gloo")
            initialize_model_parallel(1, 1)
            yield get_model(vllm_config=config)
    finally:
        cleanup_dist_env_and_memory()


@contextmanager
def engine(folder, **arguments) -> Iterator:
    """vLLM on a checkpoint, in float32."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with quickly():
        llm = LLM(str(folder), **SETTINGS | arguments)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


@contextmanager
def quickly() -> Iterator[None]:
    """Makes an engine start and end in a tenth of the time; one within another finds it done.

    From its start to its end it looks for garbage nine times: here only in what came with it, since all else stays
    frozen, where vLLM freezes every object and then none. What a model's class can do, vLLM finds out in a process of
    its own, as it still does in the tests that start processes: here in this one.
    """
    if gc.freeze is nothing:
        yield
        return
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gc, "freeze", nothing)
        patched.setattr(gc, "unfreeze", nothing)
        patched.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda ask: ask())
        yield


def nothing() -> None:
    """In place of the functions by which vLLM would freeze all objects, and then none."""


def greedy(llm, all_ids, new, **arguments):
    """vLLM's outputs for prompts that come at once."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, min_tokens=new, max_tokens=new, detokenize=False, **arguments)
    return llm.generate([{"prompt_token_ids": ids} for ids in all_ids], wanted, use_tqdm=False)


def agree(outputs, folder, new):
    """Asserts that vLLM's tokens are those of `generate`, and their log-probabilities within 1e-4."""
    model = parscale.load(folder, dtype=torch.float32).eval()
    for output in outputs:
        tokens, logprobs = reference(model, list(output.prompt_token_ids), new)
        answer = output.outputs[0]
        assert list(answer.token_ids) == tokens, len(output.prompt_token_ids)
        got = [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
        assert got == pytest.approx(logprobs, abs=1e-4)
