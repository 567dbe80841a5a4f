"""What must hold of every wrapped model whatever its weights: symmetries, ways of calling it, what it returns."""

import copy
import dataclasses

import pytest
import torch
import transformers
from packaging.version import Version

import parscale

TOLERANCE = 2e-5  # as in test_families.py


@torch.no_grad()
def logits_of(model, *args, **arguments):
    return model(*args, **arguments).logits


def stream_tensors(model, suffix):
    return [tensor for name, tensor in model.named_parameters() if name.endswith(suffix)]


# -- symmetries


def test_equal_prefixes_are_one_stream(case, zoo):
    model, ids = case.wrapped(), zoo.token_ids()
    with torch.no_grad():
        for prefix in stream_tensors(model, "prefix_k") + stream_tensors(model, "prefix_v"):
            prefix.copy_(prefix[:1].expand_as(prefix))
    reference = case.reference(model)
    zoo.close(logits_of(model, input_ids=ids), reference.head(reference.hidden(0, ids)), TOLERANCE)


def test_order_of_streams_does_not_matter(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    before = logits_of(model, input_ids=ids)
    order = torch.tensor([2, 0, 1])
    aggregator = model.get_decoder().aggregate_layer
    with torch.no_grad():
        for prefix in stream_tensors(model, "prefix_k") + stream_tensors(model, "prefix_v"):
            prefix.copy_(prefix[order])
        columns = aggregator[0].weight.unflatten(1, (-1, zoo.P))  # hidden index outer, stream index inner
        aggregator[0].weight.copy_(columns[..., order].flatten(1))
        for tensor in (aggregator[2].weight, aggregator[2].bias):
            tensor.copy_(tensor[order])
    zoo.close(logits_of(model, input_ids=ids), before, TOLERANCE)


def test_full_smoothing_is_the_plain_mean(family, zoo):
    model, ids = family.wrapped(smoothing=1.0), zoo.token_ids()
    reference = family.reference(model)
    mean = sum(reference.hidden(p, ids).double() for p in range(zoo.P)) / zoo.P
    zoo.close(logits_of(model, input_ids=ids), reference.head(mean), TOLERANCE)


def test_rows_do_not_mix(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids(rows=3)
    together = logits_of(model, input_ids=ids)
    zoo.close(together, torch.cat([logits_of(model, input_ids=row) for row in ids.split(1)]), TOLERANCE)


# -- ways of calling


def test_embeddings_in_place_of_ids(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    embeddings = model.get_input_embeddings()(ids)
    zoo.close(logits_of(model, inputs_embeds=embeddings), logits_of(model, input_ids=ids), 0.0)


@pytest.mark.parametrize("options", [{}, {"transform": "lora"}, {"kv": "shared"}], ids=str)
def test_a_layer_called_by_itself_is_the_plain_one(options, zoo):
    """Whatever ran before: it has the caller's rows, not those of the streams."""
    case, ids = zoo.Case(zoo.FAMILIES["llama"], "sdpa"), zoo.token_ids()
    plain, model = case.plain(), parscale.wrap(case.plain(), 2, prefix_length=4, init="random", **options)
    with torch.no_grad():
        for parameter in model.parscale.tensors(model.parscale.active).values():
            parameter.normal_()
    states = torch.randn(zoo.B, zoo.S, plain.config.hidden_size)
    positions = plain.model.rotary_emb(states, torch.arange(zoo.S)[None])

    def layer(owner):
        return owner.model.layers[0](states, position_embeddings=positions)

    for run in (lambda: None, lambda: model(ids), lambda: model.model(ids), lambda: model.generate(ids, max_length=12)):
        run()
        assert torch.equal(layer(model), layer(plain))


def test_a_layer_of_an_encoder_called_by_itself_is_the_plain_one(zoo):
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    plain = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    model = parscale.wrap(copy.deepcopy(plain), 2, prefix_length=4, init="random")
    states = torch.randn(zoo.B, zoo.S, 32)
    model.get_encoder()(input_ids=zoo.token_ids())
    layers = [owner.get_encoder().block[0].layer[0] for owner in (model, plain)]
    assert torch.equal(*(layer(states)[0] for layer in layers))


def test_arguments_by_position(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    expected = logits_of(model, input_ids=ids)
    zoo.close(logits_of(model, ids), expected, 0.0)
    with torch.no_grad():  # the backbone called by itself mixes too
        by_position, by_name = model.get_decoder()(ids)[0], model.get_decoder()(input_ids=ids)[0]
    assert by_position.shape[:2] == (zoo.B, zoo.S)
    zoo.close(by_position, by_name, 0.0)


def test_neither_ids_nor_embeddings_is_the_backbones_error(family):
    with pytest.raises(ValueError, match="input_ids"):
        family.wrapped()(attention_mask=None)


def test_the_callers_tensors_stay_as_they_are(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    mask, positions = torch.ones_like(ids), torch.arange(zoo.S).expand(zoo.B, -1).clone()
    logits_of(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(ids, zoo.token_ids())
    assert mask.shape == positions.shape == (zoo.B, zoo.S)


def test_loss_is_that_of_the_mixed_logits(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten().long()
    )
    assert output.logits.shape == (zoo.B, zoo.S, zoo.VOCABULARY)
    zoo.close(output.loss, expected, 1e-5)


# -- what comes back


def test_logits_to_keep(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    full = logits_of(model, input_ids=ids)
    zoo.close(logits_of(model, input_ids=ids, logits_to_keep=1), full[:, -1:], TOLERANCE)
    chosen = torch.tensor([1, 4])
    zoo.close(logits_of(model, input_ids=ids, logits_to_keep=chosen), full[:, chosen], TOLERANCE)


def test_hidden_states(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        last = model.get_decoder()(input_ids=ids).last_hidden_state
    assert len(states) == model.config.num_hidden_layers + 1
    assert {state.shape[:2] for state in states[:-1]} == {(zoo.P * zoo.B, zoo.S)}
    assert torch.equal(states[-1], last)
    assert last.shape[:2] == (zoo.B, zoo.S)
    embedded = states[0].unflatten(0, (zoo.P, zoo.B))  # stream-major
    assert all(torch.equal(embedded[p], embedded[0]) for p in range(zoo.P))
    if family.family.attention_layers is None:
        first = states[1].unflatten(0, (zoo.P, zoo.B))
        assert (first[0] - first[1]).abs().max() > 0.01


def test_attentions(family, zoo):
    model, ids = dataclasses.replace(family, attention="eager").wrapped(), zoo.token_ids()
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    attentions = [weights for weights in attentions if weights is not None]
    layers = family.family.attention_layers or range(model.config.num_hidden_layers)
    assert len(attentions) == len(layers)
    for layer, weights in zip(layers, attentions, strict=True):
        assert weights.shape == (zoo.P * zoo.B, 4, zoo.S, zoo.T + zoo.S)
        window = family.family.window_of(model.config, layer)
        seen = zoo.allowed(zoo.S, window, prefix=zoo.T).expand_as(weights)
        assert (weights[~seen] == 0).all()
        assert (weights[seen] > 0).all()  # the whole prefix, from every token
        total = weights.sum(-1)
        if family.family.name == "GptOss":  # the rest goes to the sink
            assert ((total > 0) & (total < 1)).all()
        else:
            zoo.close(total, torch.ones_like(total), 1e-6)


def test_tuples_in_place_of_named_outputs(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    arguments = {"input_ids": ids, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        named, plain = model(**arguments), model(**arguments, return_dict=False)
        decoder = model.get_decoder()
        named_decoder, plain_decoder = decoder(**arguments), decoder(**arguments, return_dict=False)
    assert isinstance(plain, tuple)
    assert isinstance(plain_decoder, tuple)
    assert torch.equal(plain[0], named.logits)
    assert torch.equal(plain_decoder[0], named_decoder.last_hidden_state)
    for states, expected in ((plain[1], named.hidden_states), (plain_decoder[1], named_decoder.hidden_states)):
        assert len(states) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


def test_configuration_asks_for_states_and_weights(family, zoo):
    model, ids = dataclasses.replace(family, attention="eager").wrapped(), zoo.token_ids()
    model.config.output_hidden_states = True
    model.config.output_attentions = True  # which transformers refuses under names of attention that it does not know
    with torch.no_grad():
        output = model(input_ids=ids)
    assert output.hidden_states[-1].shape[0] == zoo.B
    assert output.attentions[-1].shape[-1] == zoo.T + zoo.S


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.22"), reason="which came with 5.22")
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_chosen_hidden_states(family, zoo):
    """`output_hidden_states` may name the layers whose states are kept."""
    model, ids = family.wrapped(), zoo.token_ids()
    with torch.no_grad():
        plain = family.plain()(input_ids=ids, output_hidden_states=[0, 1]).hidden_states
        states = model(input_ids=ids, output_hidden_states=[0, 1]).hidden_states
        everything = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert [state is None for state in states] == [state is None for state in plain]
    for state, expected in zip(states, everything, strict=True):
        assert state is None or torch.equal(state, expected)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_multimodal_positions_have_three_rows_before_the_batch(family, zoo):
    """`(3, B, S)` positions, with B = 3 as the case that looks like a batch of three."""
    seen = {}
    model, ids = family.wrapped(), zoo.token_ids(rows=3)

    def positions(module, args, arguments):
        seen["position_ids"] = arguments["position_ids"]
        return args, arguments | {"position_ids": arguments["position_ids"][0]}

    model.get_decoder().register_forward_pre_hook(positions, with_kwargs=True)
    given = torch.arange(zoo.S).expand(3, 3, -1).clone()
    given[1:] += torch.arange(3)[None, :, None]  # height and width differ from row to row
    logits = logits_of(model, input_ids=ids, position_ids=given)
    assert seen["position_ids"].shape == (3, zoo.P * 3, zoo.S)
    assert torch.equal(seen["position_ids"], torch.cat([given] * zoo.P, dim=1))
    zoo.close(logits, logits_of(family.wrapped(), input_ids=ids, position_ids=given[0]), 0.0)
