"""Writes the folders beside this file: run with the packages of commit 39580f7, transformers 5.23 and torch 2.13."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from parscale import unwrap, wrap

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


def made(cls, config, **streams):
    """A random model with streams whose every parameter matters."""
    torch.manual_seed(0)
    model = wrap(cls(config(**SIZES)).eval(), 2, prefix_length=3, init="random", **streams)
    fill(model)
    return model


def fill(model):
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("prefix_", "aggregate_layer", "prompt", "lora_")):
            torch.nn.init.normal_(parameter, std=0.5)


@torch.no_grad()
def answers(model):
    """Logits of two texts, and what is generated after them."""
    ids = torch.arange(12).view(2, 6) + 3
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    return {"input_ids": ids, "logits": model(ids).logits, "greedy": model.generate(ids, **options)}


def write(name, model):
    """A full checkpoint."""
    model.save_pretrained(HERE / name)
    save_file(answers(model), HERE / f"{name}.safetensors")


released = made(Qwen2ForCausalLM, Qwen2Config)
released.add_streams("wide", num_streams=3, prefix_length=4, init="random")
fill(released)
write("released", released)
with released.use_streams("wide"):
    save_file(answers(released), HERE / "wide.safetensors")

write("full", made(LlamaForCausalLM, LlamaConfig))
write("full-lora", made(LlamaForCausalLM, LlamaConfig, transform="lora", rank=2))
write("full-prompt", made(LlamaForCausalLM, LlamaConfig, transform="prompt"))

streams = made(LlamaForCausalLM, LlamaConfig)
streams.save_streams(HERE / "streams")
save_file(answers(streams), HERE / "streams.safetensors")
unwrap(streams).save_pretrained(HERE / "backbone")
