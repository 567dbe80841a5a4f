"""One model called by many threads and tasks at once, each with a set of streams of its own.

Nothing is left to chance: a barrier inside the model holds each pass until all of them are in the middle of it. What
each one gives is what it gives alone, to the last bit.
"""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import parscale

IDS = torch.arange(3, 19).reshape(2, 8)
TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": transformers.LlamaConfig(**TOKENS, **SIZES, intermediate_size=48, num_key_value_heads=2),
    "bloom": transformers.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "gpt_neo": transformers.GPTNeoConfig(
        **TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=3,
        max_position_embeddings=64,
    ),
}
NAMES = ["default", "two", None]


def make(kind="llama", transform="prefix", dtype=torch.float32):
    """A model with a set of three streams, one of two and the plain backbone to choose from."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind]).to(dtype).eval()
    options = {"prefix_length": 5, "seed": 0, "transform": transform}
    parscale.wrap(model, 3, **options, init="random")
    model.add_streams("two", 2, **options | {"prefix_length": 3}, init="random")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "aggregate_layer" in name or "stream_up" in name:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(autouse=True)
def one_thread_for_each_operation():
    """Sums of floating-point numbers then have one order, whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Meeting:
    """A barrier in the backbone's last layer: each pass waits there for the others."""

    def __init__(self, model, parties):
        self.barrier = threading.Barrier(parties, timeout=60)
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
        self.hooks = [layer.register_forward_pre_hook(lambda *_: self.wait()) for layer in layers]

    def wait(self):
        self.barrier.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def with_set(model, name, function, *args, **kwargs):
    with model.use_streams(name):
        return function(*args, **kwargs)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.grid
@pytest.mark.parametrize("transform", ["prefix", "prompt", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_each_thread_runs_the_set_that_it_chose(kind, transform, at_once):
    model = make(kind, transform)
    expected = [with_set(model, name, logits, model) for name in NAMES]
    assert all(not torch.equal(expected[0], other) for other in expected[1:])
    with Meeting(model, 4):
        results = at_once(
            *(lambda name=name: with_set(model, name, logits, model) for name in NAMES), lambda: logits(model)
        )
    for result, alone in zip(results, [*expected, expected[0]], strict=True):
        assert torch.equal(result, alone)


def test_what_a_thread_reads_of_the_model_is_its_own(at_once):
    model, barrier = make(), threading.Barrier(3, timeout=60)

    def read():
        barrier.wait()
        found = model.num_streams, getattr(model.parscale.active, "name", None)
        barrier.wait()
        return found

    results = at_once(*(lambda name=name: with_set(model, name, read) for name in NAMES))
    assert results == [(3, "default"), (2, "two"), (1, None)]
    assert model.num_streams == 3


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=["beams", "static"])
def test_generation_in_threads(options, at_once):
    model = make()

    def generate():
        return model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)

    expected = [with_set(model, name, generate) for name in NAMES]
    for _ in range(3):
        results = at_once(*(lambda name=name: with_set(model, name, generate) for name in NAMES))
        for result, alone in zip(results, expected, strict=True):
            assert torch.equal(result, alone)


def test_a_choice_for_the_model_does_not_reach_a_pass_under_way(at_once):
    model = make()
    expected = {name: with_set(model, name, logits, model) for name in NAMES}
    with Meeting(model, 2) as meeting:

        def choose():
            meeting.wait()  # the other thread is in its first layer
            model.set_streams("two")
            meeting.wait()

        result, _ = at_once(lambda: logits(model), choose)
    assert torch.equal(result, expected["default"])
    assert torch.equal(logits(model), expected["two"])


def test_a_choice_within_a_block_ends_with_it(at_once):
    model = make()
    with model.use_streams(None):
        model.set_streams("two")
        assert model.num_streams == 2
        other = at_once(lambda: model.num_streams)
    assert other == [3]
    assert model.num_streams == 3
    assert model.config.parscale_n == 3


def test_tasks_of_one_event_loop():
    model = make()
    expected = [with_set(model, name, logits, model) for name in NAMES]

    async def ask(name):
        results = []
        with model.use_streams(name):
            for _ in range(3):
                await asyncio.sleep(0)  # the others' turn
                results.append(logits(model))
            results.append(await asyncio.to_thread(logits, model))
        return results

    async def all_at_once():
        return await asyncio.gather(*map(ask, NAMES))

    for results, alone in zip(asyncio.run(all_at_once()), expected, strict=True):
        assert all(torch.equal(result, alone) for result in results)
    assert model.num_streams == 3


def test_compiled_models_in_threads(at_once):
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = [with_set(model, name, logits, compiled) for name in NAMES]
    for name, alone in zip(NAMES, expected, strict=True):
        assert (alone - with_set(model, name, logits, model)).abs().max() < 2e-5  # the order of sums may differ
        assert torch.equal(with_set(model, name, logits, compiled), alone)  # what was compiled is found again
    results = at_once(*(lambda name=name: with_set(model, name, logits, compiled) for name in NAMES))
    for result, alone in zip(results, expected, strict=True):
        assert torch.equal(result, alone)


@pytest.fixture
def fresh_compiler():
    """Without the code that torch.compile gave up in this test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_tasks_that_overlap_and_call_a_compiled_model(fullgraph, fresh_compiler):
    model = make()
    expected = [with_set(model, name, logits, model) for name in NAMES]
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    refused = []

    async def ask(name, turns):
        results = []
        with model.use_streams(name):
            for _ in range(turns):
                await asyncio.sleep(0)  # the others' turn
                try:
                    results.append(logits(compiled))
                except RuntimeError as error:  # torch's, around ours
                    refused.append(str(error))
        return results

    async def all_at_once():
        return await asyncio.gather(*map(ask, NAMES, (1, 2, 3)))  # the first one that opens a block closes it first

    for results, alone in zip(asyncio.run(all_at_once()), expected, strict=True):
        assert all((result - alone).abs().max() < 2e-5 for result in results)  # the order of sums may differ
    assert bool(refused) is fullgraph
    assert all("Several tasks of this thread have blocks of use_streams open" in message for message in refused)
    assert results  # the last task's, alone in the end
    afterwards = [*(with_set(model, name, logits, compiled) for name in NAMES), logits(compiled)]
    for result, alone in zip(afterwards, [*expected, expected[0]], strict=True):
        assert (result - alone).abs().max() < 2e-5


def test_a_compiled_model_follows_the_thread():
    model = make()
    expected = [with_set(model, name, logits, model) for name in NAMES]
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    async def ask(name):
        with model.use_streams(name):
            await asyncio.sleep(0)
            return logits(compiled)

    async def one_by_one():
        results = [await asyncio.create_task(ask(name)) for name in NAMES]
        with model.use_streams("two"):
            results.append(await asyncio.to_thread(logits, compiled))
            results.append(await asyncio.to_thread(with_set, model, None, logits, compiled))
        return results

    for result, alone in zip(asyncio.run(one_by_one()), [*expected, expected[0], expected[2]], strict=True):
        assert (result - alone).abs().max() < 2e-5  # the order of sums may differ


def test_a_report_in_one_thread_leaves_the_others_mixed(at_once):
    model = make()
    report, expected = model.stream_report(IDS), logits(model)
    with Meeting(model, 2):
        found, result = at_once(lambda: model.stream_report(IDS), lambda: logits(model))
    assert torch.equal(result, expected)
    assert torch.equal(found.losses, report.losses)
    assert torch.equal(found.weights, report.weights)


def test_copies_made_in_a_block_have_its_set():
    model = make()
    expected = with_set(model, "two", logits, model)
    with model.use_streams("two"):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert other.num_streams == 2
        assert torch.equal(logits(other), expected)
        other.set_streams(None)
    assert model.num_streams == 3


def test_two_models_in_one_block():
    one, other = make(), make()
    with one.use_streams("two"):
        assert (one.num_streams, other.num_streams) == (2, 3)
        with other.use_streams(None):
            assert (one.num_streams, other.num_streams) == (2, 1)
    assert (one.num_streams, other.num_streams) == (3, 3)


def trains(model, name):
    return [p.requires_grad for p in model.parscale.tensors(model.parscale.sets[name]).values()]


def gradients(model, name):
    return {n: p.grad for n, p in model.parscale.tensors(model.parscale.sets[name]).items()}


def backward(model):
    model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sets_that_train_in_threads_get_their_own_gradients(checkpointing, at_once):
    def model():
        made = make(dtype=torch.float64)
        made.freeze_backbone()
        if checkpointing:
            made.train()
            made.gradient_checkpointing_enable({"use_reentrant": False})
        return made

    together = model()
    steps = [lambda: backward(together), lambda: with_set(together, "two", backward, together)]
    if checkpointing:  # layers run more often than once
        at_once(*steps)
    else:
        with Meeting(together, 3):
            at_once(*steps, lambda: with_set(together, None, logits, together))
    for name in ("default", "two"):
        alone = model()
        with alone.use_streams(name):
            backward(alone)
        for parameter, expected in gradients(alone, name).items():
            assert torch.allclose(gradients(together, name)[parameter], expected, rtol=1e-9, atol=1e-12), parameter
    assert all(trains(together, "default"))
    assert not any(trains(together, "two"))


def test_blocks_that_overlap_leave_what_trains_as_it_was(at_once):
    """One thread's block begins before another's and ends before it."""
    model, barrier = make(), threading.Barrier(2, timeout=60)
    frozen = next(iter(model.parscale.tensors(model.parscale.sets["default"]).values())).requires_grad_(False)
    before = trains(model, "default")

    def first():
        with model.use_streams("two"):
            barrier.wait()
            barrier.wait()
            found = trains(model, "two")
        barrier.wait()
        return found

    def second():
        barrier.wait()
        with model.use_streams(None):
            barrier.wait()
            barrier.wait()
            return trains(model, "two")

    found, afterwards = at_once(first, second)
    assert all(found)  # although the other block chose none
    assert not any(afterwards)
    assert trains(model, "default") == before
    assert not frozen.requires_grad


@pytest.mark.parametrize("init", ["random", "documents"])
def test_a_set_that_is_made_meanwhile_changes_nothing(init):
    """It runs the model with noise, and samples texts by settings of its own; here it waits in the middle of each."""
    model, reached, go_on = make(), threading.Event(), threading.Event()
    expected = model(IDS).logits
    greedy = model.generate(IDS, max_new_tokens=4, do_sample=False)
    maker = threading.Thread(target=model.add_streams, args=("new", 2), kwargs={"prefix_length": 6, "init": init})

    def wait(module, args, output):
        if threading.current_thread() is maker and not reached.is_set():
            reached.set()
            go_on.wait(timeout=60)

    hook = model.model.layers[0].register_forward_hook(wait)
    maker.start()
    assert reached.wait(timeout=60)
    try:
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), greedy)
    finally:
        go_on.set()
        maker.join()
        hook.remove()
    assert "new" in model.parscale.sets
    assert torch.equal(model(IDS).logits, expected)


def test_threads_that_save_one_model_each_save_their_own_set(at_once, tmp_path, monkeypatch):
    """All have their hooks on the model before one asks for its tensors."""
    model = make()
    expected = {name: with_set(model, name, logits, model) for name in NAMES}
    barrier, save = threading.Barrier(3, timeout=60), type(model).save_pretrained

    def together(self, *args, **kwargs):
        barrier.wait()
        save(self, *args, **kwargs)
        barrier.wait()

    monkeypatch.setattr(type(model), "save_pretrained", together)
    at_once(*(lambda name=name: with_set(model, name, model.save_pretrained, tmp_path / str(name)) for name in NAMES))
    for name, alone in expected.items():
        assert torch.equal(logits(parscale.load(tmp_path / str(name))), alone)


def test_noise_of_a_trial_is_for_its_own_thread():
    """While a set is made, each pass of another thread gives what it gives alone."""
    model, wrong, done = make(), [], threading.Event()
    expected = model(IDS).logits

    def call():
        while not done.is_set():
            if (model(IDS).logits - expected).abs().max() > 2e-5:
                wrong.append(1)

    caller = threading.Thread(target=call)
    caller.start()
    for number in range(3):
        model.add_streams(f"new{number}", 2, prefix_length=3, init="random")
    done.set()
    caller.join()
    assert not wrong
