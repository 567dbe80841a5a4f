"""`parscale generate`: the text is that of `model.generate`."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import parscale
from parscale.cli.application import run

PROMPT = "def f(x):"


def generate(capsys, *arguments: object) -> str:
    assert run(["generate", *map(str, arguments), "--device", "cpu"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("streams", [None, "off", "other"])
def test_greedy(two_sets, capsys, streams):
    model, tokenizer = parscale.load(two_sets), AutoTokenizer.from_pretrained(two_sets)
    if streams is not None:
        model.set_streams(None if streams == "off" else streams)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True
    )
    option = [] if streams is None else ["--streams", streams]
    assert generate(capsys, two_sets, "--prompt", PROMPT, "--max-new-tokens", 12, *option) == expected + "\n"


def test_sampling_is_repeatable(two_sets, capsys):
    given = [two_sets, "--prompt", PROMPT, "--max-new-tokens", 12, "--temperature", 1.5, "--seed"]
    first, again, other = (generate(capsys, *given, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_plain_backbone(backbone, capsys):
    assert generate(capsys, backbone, "--prompt", PROMPT, "--max-new-tokens", 3).startswith(PROMPT)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--prompt", ""], "The prompt has no tokens"),
        (["--prompt", "x", "--streams", "nothing"], "nothing"),
        (["--prompt", "x", "--device", "abacus"], "The device 'abacus' is not available"),
        (["--prompt", "x", "--device", "meta"], "The device 'meta' is not available"),
    ],
)
def test_bad_input(two_sets, capsys, options, complaint):
    assert run(["generate", str(two_sets), *options]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(two_sets, capsys):
    assert run(["generate", str(two_sets), "--prompt", "x", "--device", "cuda"]) == 2
    assert "The device 'cuda' is not available" in capsys.readouterr().err


def test_a_set_of_streams_of_a_plain_backbone(backbone, capsys):
    assert run(["generate", str(backbone), "--prompt", "x", "--streams", "default"]) == 2
    assert "is a plain model without a set of streams 'default'" in capsys.readouterr().err


def test_without_a_tokenizer(backbone, tmp_path, capsys):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(backbone).save_pretrained(tmp_path / "bare")
    assert run(["generate", str(tmp_path / "bare"), "--prompt", "x"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


# -- what a checkpoint's model or settings ask for


@pytest.fixture
def gpt2(byte_tokenizer, tmp_path):
    """A plain GPT-2 with 32 positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    byte_tokenizer.save_pretrained(tmp_path)
    sizes = {"vocab_size": len(byte_tokenizer), "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_learned_positions_end_somewhere(gpt2, capsys):
    """The last new token is not read: 32 positions are enough for 9 tokens of a prompt and 24 new ones."""
    given = ["generate", str(gpt2), "--device", "cpu", "--prompt"]
    assert run([*given, PROMPT, "--max-new-tokens", "24"]) == 0
    capsys.readouterr()
    assert run([*given, PROMPT, "--max-new-tokens", "25"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "prompt has 9 tokens, and the model positions for 32: --max-new-tokens is 25, and must be at most 24" in (
        printed.err
    )
    assert run([*given, "x" * 33]) == 2
    assert "33 tokens, and the model positions for 32: shorten the prompt" in capsys.readouterr().err


def test_rotary_positions_do_not_end(backbone, capsys):
    """A line says that there are too few; the last new token is not read."""
    given = ["generate", str(backbone), "--device", "cpu", "--prompt", PROMPT * 14, "--max-new-tokens"]
    assert run([*given, "8"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out) > len(PROMPT * 14)
    assert printed.err.startswith("The prompt's 126 tokens and 8 new ones are more than the 128 positions of the model")
    assert printed.err.count("\n") == 1
    assert run([*given, "3"]) == 0
    assert capsys.readouterr().err == ""


def test_adaptive_needs_streams(backbone, capsys):
    assert run(["generate", str(backbone), "--prompt", "x", "--adaptive", "1"]) == 2
    assert "adaptive chooses tokens for streams that share keys and values, but none are active" in (
        capsys.readouterr().err
    )


def test_settings_that_ask_for_beams(backbone, capsys, tmp_path):
    """A stream of text has no beams: the text is the greedy one."""
    shutil.copytree(backbone, tmp_path, dirs_exist_ok=True)
    settings = GenerationConfig.from_pretrained(tmp_path)
    settings.num_beams = 3
    settings.save_pretrained(tmp_path)
    given = ["--prompt", PROMPT, "--max-new-tokens", 5]
    assert generate(capsys, tmp_path, *given) == generate(capsys, backbone, *given)


def test_rwkv_with_prompts(byte_tokenizer, capsys, tmp_path):
    from transformers import RwkvConfig, RwkvForCausalLM

    byte_tokenizer.save_pretrained(tmp_path)
    sizes = {"vocab_size": len(byte_tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "rescale_every": 0}
    model = RwkvForCausalLM(RwkvConfig(**sizes, attention_hidden_size=32, bos_token_id=None, eos_token_id=None))
    parscale.wrap(model, 3, prefix_length=4, init="random", seed=1, transform="prompt").save_pretrained(tmp_path)
    ids = byte_tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model.eval()(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    expected = byte_tokenizer.decode(ids[0], skip_special_tokens=True)
    assert generate(capsys, tmp_path, "--prompt", PROMPT, "--max-new-tokens", 3) == expected + "\n"
