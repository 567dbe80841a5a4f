"""`wrap` runs the whole model before it promises anything, leaves it as it was, and refuses in one line."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import parscale
from parscale import UnsupportedModelError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


class Llama(transformers.LlamaForCausalLM):
    """A head with a way past the backbone: it takes what the last layer gave."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = None
        self.model.layers[-1].register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.seen = output if isinstance(output, torch.Tensor) else output[0]


class AddsRows(Llama):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.lm_head(self.seen)
        return output


class RowsForEachStream(Llama):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.lm_head(self.seen)
        return output


class LossOfLayers(Llama):
    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(self.lm_head(self.seen).flatten(0, 1), labels.flatten())
        return output


class SecondTower(transformers.LlamaForSequenceClassification):
    """What it returns beside the logits comes from embeddings alone."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output["text_embeds"] = self.model.embed_tokens(input_ids).mean(1)
        return output


class Counts(transformers.LlamaForCausalLM):
    """Counts its calls in buffers, whatever its mode, and one of its layers has statistics of batches."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(config.hidden_size)

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.register_buffer("last", torch.zeros(3))
        self.norm(torch.randn(4, self.config.hidden_size))
        return super().forward(*args, **kwargs)


def llama(cls=transformers.LlamaForCausalLM):
    torch.manual_seed(0)
    return cls(transformers.LlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (AddsRows, r"AddsRows as a whole does not run with streams.*LlamaModel.*base model"),
        (RowsForEachStream, r"returns logits of the shape \(6, [24], 96\) for \(2, 2, 96\)"),
        (LossOfLayers, r"LossOfLayers as a whole does not run with streams"),
        (SecondTower, r"a part that streams do not reach: text_embeds would stay the plain model's"),
    ],
)
@pytest.mark.parametrize("transform", ["prefix", "prompt", "lora"])
def test_what_does_not_go_through_the_backbone_is_refused(cls, reason, transform):
    model, ids = llama(cls), torch.tensor([[3, 4, 5]])
    config, names = model.config, [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        parscale.wrap(model, 3, prefix_length=2, rank=2, init="random", transform=transform)
    assert "\n" not in str(caught.value)
    assert model.config is config
    assert [name for name, _ in model.named_parameters()] == names
    assert not hasattr(model, "parscale")
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == isinstance(model, Llama)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_second_set_is_tried():
    model = parscale.wrap(llama(RowsForEachStream), 1)
    with pytest.raises(UnsupportedModelError, match="returns logits"):
        model.add_streams("three", 3, prefix_length=2, init="random")
    assert list(model.parscale.sets) == ["default"]


def test_the_trial_leaves_no_trace():
    model = llama(Counts).train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    parscale.wrap(model, 2, prefix_length=2, init="random", seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in llama(Counts).named_buffers()}
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: not enough memory"), MemoryError("none left")])
@pytest.mark.parametrize("where", ["model", ""])
def test_a_lack_of_memory_is_no_fault_of_the_model(error, where):
    def fail(module, args):
        raise error

    model = llama()
    hook = model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)):
        parscale.wrap(model, 2, prefix_length=2, init="random")
    hook.remove()
    assert parscale.wrap(model, 2, prefix_length=2, init="random").num_streams == 2


def test_a_model_on_the_meta_device_is_wrapped_without_a_run():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    assert parscale.wrap(model, 2, prefix_length=2, init="random").num_streams == 2


@torch.no_grad()
def test_a_refused_model_reads_long_texts_as_before():
    """BigBird gives up its sparse attention for good when it first reads a short text."""
    config = transformers.BigBirdConfig(**SIZES, block_size=4, num_random_blocks=1, max_position_embeddings=64)
    torch.manual_seed(0)
    model, ids = transformers.BigBirdModel(config).eval(), torch.arange(3, 43)[None]
    modules = dict(model.named_modules())
    with torch.random.fork_rng():
        expected = model(input_ids=ids).last_hidden_state
    with pytest.raises(UnsupportedModelError, match="BigBirdModel pools its first token"):
        parscale.wrap(model, 2, prefix_length=2, transform="prompt", init="random")
    assert dict(model.named_modules()) == modules
    assert model.attention_type == "block_sparse"
    assert torch.equal(model(input_ids=ids).last_hidden_state, expected)


# -- a language model with its head inside another


def blip2(text):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Blip2Config(
        text_config=text,
        vision_config=small | {"image_size": 8, "patch_size": 4},
        qformer_config=small | {"encoder_hidden_size": 32, "vocab_size": 50},
        num_query_tokens=4,
        image_token_index=90,
    )
    torch.manual_seed(0)
    return transformers.Blip2ForConditionalGeneration(config).eval()


def blip2_opt():
    return blip2(SIZES | {"model_type": "opt", "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32})


def blip2_t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return blip2({"model_type": "t5", "vocab_size": 96, "pad_token_id": 0} | sizes)


def blip():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = small | {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config=text | {"encoder_hidden_size": 32, "max_position_embeddings": 64},
        vision_config=small | {"image_size": 8, "patch_size": 4},
    )
    torch.manual_seed(0)
    return transformers.BlipForConditionalGeneration(config).eval()


def llama4():
    text = SIZES | {"intermediate_size_mlp": 48, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    torch.manual_seed(0)
    config = transformers.Llama4Config(text_config=text, vision_config=vision, image_token_index=90)
    return transformers.Llama4ForConditionalGeneration(config).eval()


def with_image(rows=2):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 90, (rows, 9), generator=generator)
    ids[:, 1:5] = 90
    return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}


@pytest.mark.parametrize(
    ("make", "backbone"),
    [
        (blip2_opt, "language_model.model.decoder"),
        (blip2_t5, "language_model.decoder"),
        (llama4, "language_model.model"),
    ],
)
def test_a_language_model_with_its_head_inside_another(make, backbone, zoo):
    arguments = with_image()
    labels = arguments["input_ids"].where(arguments["input_ids"] != 90, 3)
    if make is llama4:
        arguments = {"input_ids": labels}
    if make is blip2_t5:
        arguments["decoder_input_ids"] = labels[:, :5]
        labels = labels[:, :5].contiguous()
    plain, model = make(), parscale.wrap(make(), 3, prefix_length=4, init="random", seed=0)
    assert model.parscale.backbone_name == backbone
    zoo.fill_streams(model)
    if make is llama4 and Version(transformers.__version__) == Version("5.24.0"):
        for each in (plain, model):
            with pytest.raises(AttributeError, match="image_outputs"):
                each(**arguments)
        pytest.skip("Llama4ForConditionalGeneration of transformers 5.24.0 does not run, without streams either")
    with torch.no_grad():
        expected, found = plain(**arguments), model(**arguments)
        assert found.logits.shape == expected.logits.shape
        assert (found.logits - expected.logits).abs().max() > 1e-3
        loss = model(**arguments, labels=labels).loss
        shifted = (found.logits, labels) if make is blip2_t5 else (found.logits[:, :-1], labels[:, 1:])
        zoo.close(loss, nn.functional.cross_entropy(shifted[0].flatten(0, 1), shifted[1].flatten()), 1e-5)
        rows = [model(**{name: value[row : row + 1] for name, value in arguments.items()}).logits for row in (0, 1)]
        zoo.close(torch.cat(rows), found.logits, 2e-5)
        parscale.unwrap(model)
        assert torch.equal(model(**arguments).logits, expected.logits)


BEAMS = {"num_beams": 3, "num_return_sequences": 3}


@torch.no_grad()
def decided(model):
    """The model with larger weights, or its beams would write the same whatever rows the cache had."""
    for parameter in model.get_decoder().parameters():
        if parameter.ndim > 1:
            parameter.mul_(12)
    return model


def written(model, **options):
    """The text of a model whose `generate` is that of the model inside it."""
    if not isinstance(model, transformers.BlipForConditionalGeneration):  # it passes its own
        options = {"pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(**with_image(), max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("make", [blip2_opt, blip2_t5, blip])
def test_beams_of_a_model_inside(make):
    """Streams that change nothing write the plain model's text, and no method stays in the inner model."""
    model = decided(make())
    inner = model.get_decoder()
    expected = written(model, **BEAMS)
    members = set(vars(inner))
    parscale.wrap(model, 3, transform="lora", rank=2, seed=0)
    assert torch.equal(written(model, **BEAMS), expected)
    parscale.unwrap(model)
    assert set(vars(inner)) == members
    assert torch.equal(written(model, **BEAMS), expected)


@pytest.mark.parametrize(("make", "kv"), [(blip2_opt, "own"), (blip2_opt, "shared"), (blip2_t5, "own")])
def test_beams_of_a_model_inside_with_prefixes(make, kv, zoo):
    model = parscale.wrap(decided(make()), 3, prefix_length=4, init="random", seed=0, kv=kv)
    zoo.fill_streams(model)
    found = written(model, **BEAMS)
    assert torch.equal(found, written(model, use_cache=False, **BEAMS))
    assert not torch.equal(found, written(parscale.unwrap(model), **BEAMS))


@torch.no_grad()
def test_uncertain_tokens_of_a_model_inside(zoo):
    """Each token by two whole models, by hand; at the ends all streams, and the plain model."""
    model = parscale.wrap(blip2_opt(), 3, prefix_length=4, init="random", seed=0, kv="shared")
    zoo.fill_streams(model)

    def last_logits(ids, chosen):
        with model.use_streams(chosen):
            return model(**with_image() | {"input_ids": ids}, use_cache=False).logits[:, -1]

    def entropy(logits):
        return torch.distributions.Categorical(logits=logits).entropy()

    ids, ran = with_image()["input_ids"], 0
    threshold = float(entropy(last_logits(ids, None)).mean())
    for _ in range(6):
        alone, mixed = (last_logits(ids, chosen) for chosen in (None, "default"))
        uncertain = entropy(alone) > threshold
        ran += int(uncertain.sum())
        ids = torch.cat([ids, torch.where(uncertain[:, None], mixed, alone).argmax(-1, keepdim=True)], 1)
    assert torch.equal(written(model, adaptive=threshold), ids)
    assert 0 < ran < 12  # or it would show nothing
    assert model.last_mean_streams == pytest.approx(1 + 2 * ran / 12)

    assert torch.equal(written(model, adaptive=1e-9), written(model))
    assert model.last_mean_streams == 3
    found = written(model, adaptive=100.0)
    assert model.last_mean_streams == 1
    assert torch.equal(found, written(parscale.unwrap(model)))


@torch.no_grad()
def test_an_image_encoder_before_a_language_model_with_a_head(zoo):
    """The encoder of the pair gets the rows, not one inside the decoder."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.ViTModel(transformers.ViTConfig(**small, image_size=8, patch_size=4))
    decoder = transformers.BertLMHeadModel(
        transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True, max_position_embeddings=64)
    )
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    arguments = {"pixel_values": with_image()["pixel_values"], "decoder_input_ids": torch.tensor([[3, 4], [5, 6]])}
    expected = model(**arguments).logits
    parscale.wrap(model, 3, prefix_length=2, init="random", seed=0)
    assert model.parscale.encoder is model.encoder
    zoo.fill_streams(model)
    found = model(**arguments).logits
    assert found.shape == expected.shape
    rows = [model(**{name: value[row : row + 1] for name, value in arguments.items()}).logits for row in (0, 1)]
    zoo.close(torch.cat(rows), found, 2e-5)


def test_inputs_of_generate_by_their_places():
    """The second argument of these models is token ids, where it is elsewhere the generation's configuration."""
    arguments, model = with_image(), parscale.wrap(blip2_opt(), 2, prefix_length=2, init="random", seed=0)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**arguments, **options)
    assert torch.equal(model.generate(arguments["pixel_values"], arguments["input_ids"], **options), expected)
