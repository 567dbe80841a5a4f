"""A model that does not exist yet: what it is made of, and the model itself, which the same seed makes again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from parscale import ParScaleConfig, wrap
from parscale.checkpoints.models import find_tokenizer, require_language_model, require_tokenizer
from parscale.checkpoints.training.model_size import checked_size, configuration, shape_of
from parscale.format.folders import CONFIG, has_stream_fields, read_json
from parscale.format.pretrained import read_pretrained
from parscale.format.values import configuration_of


@dataclass(frozen=True)
class NewModel:
    """A model with random weights, to train from nothing.

    Attributes:
        config: the file `config.json` of a causal language model; or, where there is no such file, a size such as
            `"20M"`, of a Qwen2 model with about as many parameters, without those of its embeddings.
        tokenizer: a folder with one, or a name on the Hugging Face Hub; its special tokens become the model's.
        streams: of the model; 1 makes it a plain one. They start at random, whatever `init` says.
        seed: of the weights.
        sequence_length: the longest that a model of which a size is given has to take; it takes at least 2048 tokens.

    Raises:
        ValueError: there is no such file, and it is no size.
    """

    config: Path | str
    tokenizer: str
    streams: ParScaleConfig
    seed: int = 0
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        if Path(self.config).is_dir():
            raise ValueError(f"{self.config} is a folder; give the {CONFIG} of a causal language model.")
        if not Path(self.config).is_file():
            checked_size(str(self.config))

    def __str__(self) -> str:
        return str(self.config)

    @property
    def size(self) -> float | None:
        """The size that is given in place of a file; None where there is the file.

        Raises:
            ValueError: there is no such file, and it is no size.
        """
        return None if Path(self.config).is_file() else checked_size(str(self.config))

    def find_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which is read once.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return require_tokenizer(find_tokenizer(self.tokenizer), self.tokenizer)

    def check(self) -> None:
        """Refuses a configuration from which no model can be made, before anything is built.

        Raises:
            ValueError: it is damaged, of a model with streams or quantized, or knows fewer tokens than the tokenizer.
        """
        size = self.size
        fields = read_json(Path(self.config)) if size is None else self._fields(size)
        if has_stream_fields(fields):
            raise ValueError(f"{self.config} is of a model with streams; give that of its backbone.")
        if fields.get("quantization_config"):
            raise ValueError(f"{self.config} is of a quantized model, which cannot train; leave the quantization out.")
        tokens = len(self.find_tokenizer())
        with configuration_of(self):
            known = int(self._configuration().get_text_config().vocab_size)
        if tokens > known:
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
        size = self.size
        config = Path(self.config).read_bytes() if size is None else json.dumps(self._fields(size), indent=2).encode()
        given = (config, repr(self.streams).encode(), str(self.seed).encode())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in given)).hexdigest()

    def described(self) -> dict[str, Any]:
        """What a run's settings say of it."""
        said = {"config": str(self.config), "tokenizer": self.tokenizer, "num_streams": self.streams.num_streams}
        if (size := self.size) is None:
            return said
        return said | {"parameters": shape_of(size).parameters, "configuration": self._fields(size)}

    def _fields(self, size: float) -> dict[str, Any]:
        """Those of the `config.json` of a model of this size."""
        return configuration(size, len(self.find_tokenizer()), self.sequence_length)

    def _configuration(self) -> Any:
        size = self.size
        with configuration_of(self):
            config = (
                read_pretrained(AutoConfig, self.config) if size is None else AutoConfig.for_model(**self._fields(size))
            )
        tokenizer, text = self.find_tokenizer(), config.get_text_config()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, getattr(tokenizer, name))
        return config
