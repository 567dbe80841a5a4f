"""What vLLM's Model Runner V2 keeps for a model whose streams share keys, beside its own state.

It tells the model before each step which tokens will be predicted from, and what their requests ask for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from parscale.compat.vllm import DefaultModelState
from parscale.integrations.vllm.sampling import RequestOptions

if TYPE_CHECKING:
    from parscale.compat.vllm import InputBatch, NewRequestData, RequestState


class StreamState(DefaultModelState):
    """By the number that the runner gives a request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_single, self.wants_prompt = np.zeros((2, self.max_num_reqs), dtype=bool)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Notes what a new request asks for."""
        super().add_request(req_index, new_req_data)
        options = RequestOptions.of(new_req_data.sampling_params)
        self.is_single[req_index], self.wants_prompt[req_index] = options

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """What the model is called with beyond tokens and positions: those that run with all streams."""
        own: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        requests = input_batch.idx_mapping_np
        is_single = self.is_single[requests]
        rows = self.model.rows
        rows.mark(_tensor(np.repeat(is_single, input_batch.num_scheduled_tokens)) if is_single.any() else None)
        last = input_batch.logits_indices
        if (self.wants_prompt[requests] & input_batch.is_prefilling_np).any():
            return own
        if is_single.any():
            keep = np.repeat(~is_single, np.diff(input_batch.cu_num_logits_np))
            last = last[_tensor(np.flatnonzero(keep)).to(self.device, non_blocking=True)]
        return own if last.shape[0] == input_batch.num_tokens else own | {"chosen": last}


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
