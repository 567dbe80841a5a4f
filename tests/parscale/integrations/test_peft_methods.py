"""Every method of PEFT on a wrapped model: it works with streams as a whole, or is refused in one line."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from lora_adapters import is_stream
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

import parscale
from parscale.integrations.peft.methods import METHODS

peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "peft.md"
LAYERS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
PROMPTS = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
SPECIAL = {
    "ADALORA": LAYERS | {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM"},
    "BEFT": LAYERS | {"target_modules": ["v_proj"]},
    "BOFT": LAYERS | {"boft_block_size": 4},
    "C3A": LAYERS | {"block_size": 16},
    "CARTRIDGE": PROMPTS,
    "CPT": {
        "cpt_token_ids": [5, 6, 7, 8],
        "cpt_mask": [1, 1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 3, 4],
        # CPT shortens its vectors to this length at each pass; those that are shorter are not rounded again each time.
        "opt_projection_epsilon": 100.0,
        "opt_projection_format_epsilon": 100.0,
        "task_type": "CAUSAL_LM",
    },
    "FOURIERFT": LAYERS | {"n_frequency": 16},
    "GRALORA": LAYERS | {"gralora_k": 2, "hybrid_r": 0},
    "IA3": LAYERS | {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"task_type": "CAUSAL_LM"},
    "MULTITASK_PROMPT_TUNING": PROMPTS | {"num_tasks": 2},
    "OFT": LAYERS | {"oft_block_size": 4},
    "POLY": LAYERS | {"n_tasks": 2, "n_skills": 2, "n_splits": 2},
    "PREFIX_TUNING": PROMPTS,
    "PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS | {"encoder_hidden_size": 16},
    "ROAD": LAYERS | {"group_size": 16},
    "SHADOW": {"task_type": "CAUSAL_LM"},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5], "task_type": "CAUSAL_LM"},
    "VBLORA": LAYERS | {"num_vectors": 8, "vector_length": 4},
    "WAVEFT": LAYERS | {"n_frequency": 16},
    "XLORA": {"hidden_size": 32, "adapters": {"a": "a"}, "task_type": "CAUSAL_LM"},
}
HERE = [kind.value for kind in peft.PeftType]
TAKEN = [kind for kind in HERE if kind in METHODS and not METHODS[kind].refused]
REFUSED = [kind for kind in HERE if kind in METHODS and METHODS[kind].refused]
TASKS = {"task_ids": torch.tensor([0, 1])}
NOT_MERGED = {
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "P_TUNING"),
}

each = pytest.mark.parametrize("kind", TAKEN)


def config_of(kind):
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    arguments = dict(SPECIAL.get(kind, LAYERS))
    if "r" in cls.__dataclass_fields__ and "target_modules" in arguments and kind != "OFT":
        arguments["r"] = 2
    return cls(**arguments)


@torch.no_grad()
def adapted(model, kind):
    """With weights that matter, the same ones for the same kind."""
    torch.manual_seed(0)
    tuned, drawn = peft.get_peft_model(model, config_of(kind)), torch.Generator().manual_seed(1)
    for name, tensor in sorted(tuned.named_parameters()):
        if tensor.requires_grad and not is_stream(name):
            tensor += 0.1 * torch.randn(tensor.shape, generator=drawn)
    return tuned.eval()


@torch.no_grad()
def move_streams(model):
    for name, tensor in model.named_parameters():
        if is_stream(name) and tensor.requires_grad:
            tensor += 0.1


@torch.no_grad()
def logits_of(model, ids, kind=None):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments_of(kind)).logits


def arguments_of(kind):
    return TASKS if kind in ("POLY", "MULTITASK_PROMPT_TUNING") else {}


@pytest.fixture
def llama(zoo):
    return zoo.FAMILIES["llama"]


@pytest.fixture
def wrapped(llama, zoo):
    """A function that makes the same wrapped model each time, of streams that matter."""
    return zoo.Case(llama, "sdpa").wrapped


def test_each_method_is_described():
    assert set(HERE) <= set(METHODS), "say in METHODS and docs/peft.md how these go with streams"


def test_the_page_says_what_the_code_does():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row[0] for row in rows] == sorted(METHODS)
    for kind, goes, merges, with_lora in rows:
        method = METHODS[kind]
        if method.refused:
            assert (goes, merges, with_lora) == ("no", "-", "-"), kind
        else:
            assert goes == "yes", kind
            assert merges == ("no" if kind in NOT_MERGED else "yes"), kind
            assert with_lora == ("yes" if method.keeps_outputs else "no"), kind


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.nightly) if kind == "ADAMSS" else kind  # it clusters by scikit-learn
        for kind in TAKEN
        if METHODS[kind].keeps_outputs
    ],
)
def test_rows_of_streams_are_rows_of_the_method(llama, zoo, kind):
    """Streams that differ by nothing yet: what the plain backbone gives with the same adapter."""
    ids = zoo.token_ids()
    model = parscale.wrap(llama.build("sdpa"), 3, transform="lora", rank=2, seed=0)
    expected = logits_of(adapted(llama.build("sdpa"), kind), ids, kind)
    zoo.close(logits_of(adapted(model, kind), ids, kind), expected, 5e-6 * max(1.0, expected.abs().max().item()))


BERT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MODELS = {  # class, configuration, task, layers, labels
    "T5ForConditionalGeneration": (T5, "SEQ_2_SEQ_LM", ["q", "v"], {"labels": torch.tensor([[5, 6], [7, 8]])}),
    "BertForSequenceClassification": (BERT, "SEQ_CLS", ["query"], {"labels": torch.tensor([0, 1])}),
    "BertForTokenClassification": (BERT, "TOKEN_CLS", ["query"], {}),
    "BertForQuestionAnswering": (BERT, "QUESTION_ANS", ["query"], {}),
    "BertModel": (BERT, "FEATURE_EXTRACTION", ["query"], {}),
}
# For these tasks PEFT looks the cache up by its name, which 5.24 changed; a PEFT older than 5.24 asks for knows it not.
RENAMED = Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) < Version(MIN_PEFT_VERSION)
TASKS_WITHOUT_PREFIX = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") if RENAMED else ()


@pytest.mark.grid
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "PROMPT_TUNING"])
def test_rows_under_every_task(zoo, name, kind):
    numbers, task, layers, labels = MODELS[name]
    cls, found = getattr(transformers, name), []
    arguments = {"target_modules": layers, "init_lora_weights": False} if kind == "LORA" else {"num_virtual_tokens": 4}
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = cls(cls.config_class(**numbers)).eval()
        if wrapped:
            parscale.wrap(model, 3, transform="lora", rank=2)
        torch.manual_seed(0)
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type=task, **arguments)
        tuned, ids = peft.get_peft_model(model, config).eval(), zoo.token_ids()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | labels
        if kind == "PREFIX_TUNING" and task in TASKS_WITHOUT_PREFIX and not wrapped:
            with pytest.raises(ValueError, match="does not support past key values"):
                tuned(**inputs)
            pytest.skip(f"PEFT {peft.__version__} knows no cache of this transformers, without streams either")
        with torch.no_grad():
            found.append(tuned(**inputs)[0])
    zoo.close(found[1], found[0], 2e-5)


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "PROMPT_TUNING", "ADAPTION_PROMPT"])
def test_a_model_without_a_head_runs_its_streams(llama, zoo, kind):
    """It is its own backbone, and so its own `forward` runs no streams."""
    model, ids = transformers.LlamaModel(llama.config("sdpa")).eval(), zoo.token_ids()
    parscale.wrap(model, 3, prefix_length=4, init="random", seed=0)
    expected = model(input_ids=ids)[0]
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    tuned = peft.get_peft_model(model, cls(**SPECIAL.get(kind, LAYERS) | {"task_type": "FEATURE_EXTRACTION"})).eval()
    if kind in ("LORA", "ADAPTION_PROMPT"):  # PEFT switches off prompts of models that generate only
        with tuned.disable_adapter():
            assert torch.equal(tuned(input_ids=ids)[0], expected)
    tuned(input_ids=ids)[0].sum().backward()
    assert all(tensor.grad is not None for name, tensor in tuned.named_parameters() if is_stream(name))


@each
def test_streams_train_and_are_switched_off_with_an_adapter(wrapped, zoo, kind):
    if kind == "PVERA" and "generator" not in torch.randn_like.__doc__:
        pytest.skip("PVERA trains by a randn_like with a generator, which this torch does not take")
    ids, model = zoo.token_ids(), wrapped()
    before = logits_of(model, ids)
    tuned = adapted(model, kind)
    streams = {name: tensor for name, tensor in tuned.named_parameters() if is_stream(name)}
    assert all(tensor.requires_grad for tensor in streams.values())
    tuned.train()
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **arguments_of(kind)).loss.backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in streams.values())
    move_streams(tuned.eval())
    on = logits_of(tuned, ids, kind)
    with tuned.disable_adapter():
        assert torch.equal(logits_of(tuned, ids), before)
    assert torch.equal(logits_of(tuned, ids, kind), on)
    with pytest.raises(RuntimeError, match="inside"), tuned.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits_of(tuned, ids, kind), on)


@each
def test_streams_are_saved_and_loaded_with_an_adapter(wrapped, zoo, tmp_path, kind):
    if kind == "ADAMSS" and Version(peft.__version__) < Version("0.20"):
        pytest.skip("PEFT 0.19 does not load what it saves of it, without streams either")
    ids = zoo.token_ids()
    tuned = adapted(wrapped(), kind)
    move_streams(tuned)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(wrapped(), tmp_path).eval()
    zoo.close(logits_of(again, ids, kind), logits_of(tuned, ids, kind), 1e-6)  # CPT saves a sum that it else computes


@pytest.mark.grid
@pytest.mark.parametrize("kind", [kind for kind in TAKEN if kind not in NOT_MERGED])
@pytest.mark.parametrize("transform", ["prefix", "lora"])
def test_streams_stay_when_it_is_merged(llama, zoo, kind, transform):
    ids = zoo.token_ids()
    model = llama.build("sdpa", dtype=torch.float32 if kind == "PSOFT" else torch.float64)  # whose start takes no other
    parscale.wrap(model, 3, prefix_length=3, init="random", transform=transform, seed=0)
    if transform == "lora" and not METHODS[kind].keeps_outputs:
        with pytest.raises(ValueError, match=rf"does not support streams: {kind} with transform='lora'.*Use LoRA, or"):
            peft.get_peft_model(model, config_of(kind))
        return
    tuned = adapted(model, kind)
    move_streams(tuned)
    expected = logits_of(tuned, ids, kind)
    merged = tuned.merge_and_unload()
    assert merged is model
    assert merged.parscale.adapters is None
    zoo.close(logits_of(merged, ids), expected, 2e-5)  # some methods compute in float32


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_go_is_refused_and_leaves_the_model_as_it_was(wrapped, zoo, kind):
    model = wrapped()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=rf"^This adapter does not support streams: {kind}: .*Use another method"):
        peft.get_peft_model(model, config_of(kind))
    assert [name for name, _ in model.named_modules()] == names
