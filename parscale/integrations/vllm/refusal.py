"""Checkpoints with streams that vLLM must not serve: registered by name, and refused with the reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry


def register_refused(architecture: str, reason: str) -> None:
    """Registers an architecture as one for whose checkpoints vLLM stops at startup, with a reason.

    Otherwise vLLM would look for a way to run the model that ignores its streams.

    Args:
        architecture: as in `config.json`.
        reason: the message.
    """
    ModelRegistry.register_model(architecture, f"{Refused.__module__}:{Refused.__name__}")
    try:
        from parscale.compat.vllm import MODELS_CONFIG_MAP, TRANSFORMERS_BACKEND_MODELS, VerifyAndUpdateConfig
    except ImportError:  # another version of vLLM; then the model itself raises the error, when it is made
        return

    def verify_and_update_config(vllm_config: object) -> None:
        raise ValueError(reason)

    body = {verify_and_update_config.__name__: staticmethod(verify_and_update_config)}
    MODELS_CONFIG_MAP[architecture] = type(architecture, (VerifyAndUpdateConfig,), body)
    TRANSFORMERS_BACKEND_MODELS[architecture] = (Refused.__module__, Refused.__name__)


class Refused(nn.Module):
    """The minimal interface that vLLM expects of a language model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("parscale does not serve this model with streams, or not by this version of vLLM.")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError
