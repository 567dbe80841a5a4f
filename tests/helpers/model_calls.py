"""Calls of models: logits, `generate`, one stream chosen, with fixed greedy options."""

import torch

from parscale.streams.backbones import cache_argument

# What `generate` is given unless a test says otherwise: greedy, and no text ends before its time.
STEPS = 7
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

IDS = torch.arange(18).remainder(17).view(2, 9) + 3


def given(model, cache):
    """The cache as an argument, under the name that the model of the installed transformers has for it."""
    return {} if cache is None else {cache_argument(model): cache}


@torch.no_grad()
def logits_of(model, input_ids, cache=None, **arguments):
    return model(input_ids=input_ids, **given(model, cache), **arguments).logits


@torch.no_grad()
def exact_logits_of(model, input_ids=IDS, **arguments):
    """Exactly: weights that are read from a file in place lie where matrix products may round in another order."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()(input_ids, **arguments).logits


def generate(model, ids, padding=None, cache=None, **arguments):
    padding = torch.ones_like(ids) if padding is None else padding
    return model.generate(ids, attention_mask=padding, **GREEDY | given(model, cache) | arguments)


def choose_stream(model, p):
    """Has the aggregator give stream p all weight, in a model with a smoothing of 0."""
    last = next(module for name, module in model.named_modules() if name.endswith("aggregate_layer"))[2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-1e4)[p] = 1e4
