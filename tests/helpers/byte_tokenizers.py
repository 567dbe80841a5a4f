"""Tokenizers of single bytes, of the class that models come with."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END, BEGIN = "<end>", "<begin>"


def tokenizer_of_bytes(*, begins=False, ends=True):
    """One token for each byte, the end of text as number 256, and, where texts begin with it, 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {letter: number for number, letter in enumerate([*alphabet, END, *[BEGIN] * begins])}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"eos_token": END, "pad_token": END} if ends else {}
    if begins:
        own = [(BEGIN, numbers[BEGIN])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=own)
        named["bos_token"] = BEGIN
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
