"""A model that does not exist yet: what it is made of, and the model itself, which the same seed makes again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from parscale import ParScaleConfig, wrap
from parscale.checkpoints.models import find_tokenizer, require_language_model, require_tokenizer
from parscale.config import NUM_STREAMS
from parscale.format.folders import CONFIG, TYPE_SUFFIX, read_json
from parscale.format.pretrained import read_pretrained
from parscale.format.values import configuration_of


@dataclass(frozen=True)
class NewModel:
    """A model with random weights, to train from nothing.

    Attributes:
        config: the file `config.json` of a causal language model.
        tokenizer: a folder with one, or a name on the Hugging Face Hub; its special tokens become the model's.
        streams: of the model; 1 makes it a plain one. They start at random, whatever `init` says.
        seed: of the weights.

    Raises:
        ValueError: there is no such file.
    """

    config: Path
    tokenizer: str
    streams: ParScaleConfig
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.config.is_file():
            kind = "a folder" if self.config.is_dir() else "no file"
            raise ValueError(f"{self.config} is {kind}; give the {CONFIG} of a causal language model.")

    def __str__(self) -> str:
        return str(self.config)

    def find_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        return require_tokenizer(find_tokenizer(self.tokenizer), self.tokenizer)

    def check(self) -> None:
        """Refuses a configuration from which no model can be made, before anything is built.

        Raises:
            ValueError: it is damaged, of a model with streams or quantized, or knows fewer tokens than the tokenizer.
        """
        fields = read_json(self.config)
        if NUM_STREAMS in fields or str(fields.get("model_type", "")).endswith(TYPE_SUFFIX):
            raise ValueError(f"{self.config} is of a model with streams; give that of its backbone.")
        if fields.get("quantization_config"):
            raise ValueError(f"{self.config} is of a quantized model, which cannot train; leave the quantization out.")
        with configuration_of(self):
            known = int(self._configuration().get_text_config().vocab_size)
        if (tokens := len(self.find_tokenizer())) > known:
            raise ValueError(
                f"The tokenizer {self.tokenizer} has {tokens:,} tokens, and vocab_size of {self.config} is {known:,}; "
                f"set it to {tokens:,} or more."
            )

    def make(self, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """The model, the same each time.

        Args:
            dtype: as the configuration says unless given, and float32 if that says none.
            **options: for `AutoModelForCausalLM.from_config`, such as `attn_implementation`.

        Returns:
            The wrapped or plain model.

        Raises:
            ValueError: the configuration is damaged, or no causal language model's.
        """
        config = self._configuration()
        made = dtype or config.dtype or torch.float32
        with torch.random.fork_rng(devices=[]), configuration_of(self):
            torch.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        require_language_model(model, str(self.config))
        if self.streams.num_streams > 1:
            seed = self.seed if self.streams.seed is None else self.streams.seed
            wrap(model, replace(self.streams, init="random", seed=seed))
        return model.to(made)

    def digest(self) -> str:
        """A digest of what the model is made of."""
        given = (self.config.read_bytes(), repr(self.streams).encode(), str(self.seed).encode())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in given)).hexdigest()

    def described(self) -> dict[str, Any]:
        """What a run's settings say of it."""
        return {"config": str(self.config), "tokenizer": self.tokenizer, "num_streams": self.streams.num_streams}

    def _configuration(self) -> Any:
        with configuration_of(self):
            config = read_pretrained(AutoConfig, self.config)
        tokenizer, text = self.find_tokenizer(), config.get_text_config()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, getattr(tokenizer, name))
        return config
