"""New weights from a trainer, under the names of its model: vLLM then answers as that model does.

TRL sends each tensor by itself to the model in its process, and all of them to a server, which reloads layer by layer.
"""

import pytest
import torch

import parscale

IDS = [list(range(40, 75)), list(range(90, 97))]
NEW = 10


def by_name(llm, model):
    """As TRL's `vllm_mode="colocate"` does."""
    engine = llm.llm_engine.model_executor.driver_worker.model_runner.model
    for name, parameter in model.named_parameters():
        engine.load_weights([(name, parameter.data)])


def by_layer(llm, model):
    """As vLLM's weight transfer does, to which TRL's `vllm_mode="server"` sends."""
    weights = [(name, parameter.data) for name, parameter in model.named_parameters()]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})


@pytest.fixture
def keeps_weights(monkeypatch):
    """Linear layers as on GPUs: on a CPU vLLM packs them for oneDNN and drops the tensors that could be written to."""
    monkeypatch.setattr("vllm._custom_ops._supports_onednn", False)


@torch.no_grad()
def trained(folder):
    """What a training that moves every tensor would leave."""
    model = parscale.load(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.5 * parameter.std())
    return model


def answers(llm, serving):
    return [list(output.outputs[0].token_ids) for output in serving.greedy(llm, IDS, NEW)]


def expected(model, serving):
    return [serving.reference(model, ids, NEW)[0] for ids in IDS]


@pytest.mark.parametrize("kv", ["own", "shared"])
@pytest.mark.parametrize("send", [by_name, by_layer])
def test_the_answers_are_those_of_the_trained_model(make_folder, serving, keeps_weights, send, kv):
    folder = make_folder("Qwen2", 4, kv=kv, tie_word_embeddings=kv == "own")
    model = trained(folder)
    with serving.engine(folder) as llm:
        before = answers(llm, serving)
        send(llm, model)
        llm.reset_prefix_cache()
        after = answers(llm, serving)
    assert before == expected(parscale.load(folder, dtype=torch.float32).eval(), serving)
    assert after == expected(model, serving)
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_a_window_and_packed_layers(make_folder, serving):
    """A prefix apart from the cache, and layers as vLLM packs them on a CPU."""
    folder = make_folder("Mistral", 2, sliding_window=24)
    model = trained(folder)
    with serving.engine(folder) as llm:
        by_layer(llm, model)
        llm.reset_prefix_cache()
        assert answers(llm, serving) == expected(model, serving)


def test_further_sets_are_left_out(make_folder, fill, serving, keeps_weights, tmp_path):
    model = parscale.load(make_folder("Llama", 4), dtype=torch.float32).eval()
    model.add_streams("other", 2, prefix_length=5, init="random")
    model.save_pretrained(tmp_path)
    fill(model)
    with serving.engine(tmp_path) as llm:
        by_name(llm, model)
        llm.reset_prefix_cache()
        assert answers(llm, serving) == expected(model, serving)


def test_another_set_takes_no_new_weights(make_folder, serving, tmp_path):
    """Its tensors have other names in the trainer's model than in the engine, where the default's would take them."""
    model = parscale.load(make_folder("Llama", 4), dtype=torch.float32)
    model.add_streams("other", 2, prefix_length=5, init="random")
    model.save_pretrained(tmp_path)
    match = r"for the streams named 'default', but vLLM serves the set 'other': train"
    chosen = {"parscale_name": "other"}
    with serving.engine(tmp_path, hf_overrides=chosen) as llm, pytest.raises(ValueError, match=match):
        by_name(llm, model)
