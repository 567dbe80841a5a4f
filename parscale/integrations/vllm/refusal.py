"""Checkpoints with streams that vLLM is not to serve: known by name, and refused with the reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry


def refuse(architecture: str, reason: str) -> None:
    """Makes vLLM end at its start with one reason for checkpoints of this architecture.

    Without it vLLM would look for a way to run the model that knows nothing of its streams.

    Args:
        architecture: as in `config.json`.
        reason: what to say.
    """
    ModelRegistry.register_model(architecture, f"{Refused.__module__}:{Refused.__name__}")
    try:
        from parscale.compat.vllm import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    except ImportError:  # of another version; then the model itself refuses, when it is made
        return

    def verify_and_update_config(vllm_config: Any) -> None:
        raise ValueError(reason)

    body = {verify_and_update_config.__name__: staticmethod(verify_and_update_config)}
    MODELS_CONFIG_MAP[architecture] = type(architecture, (VerifyAndUpdateConfig,), body)


class Refused(nn.Module):
    """What vLLM wants to see in a language model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("This model, or this version of vLLM, is none that parscale serves with streams.")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError
