"""What a request asks of the streams: one of them only, or the predictions of its whole prompt.

`SamplingParams(extra_args={"parscale_streams": 1})`, or `"vllm_xargs": {"parscale_streams": 1}` in a request to the
server, runs it as the plain backbone. A worker learns that from Model Runner V2 as the model's state
(`parscale.integrations.vllm.model_state`), and from V1 as a logits processor, the one thing of V1's that is told the
parameters of each request in the batch before the model runs. In both a logits processor is what checks them in the
front end, where streams with keys of their own have it refuse one stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from parscale.compat.vllm import LogitsProcessorV1, LogitsProcessorV2, MoveDirectionality

if TYPE_CHECKING:
    from vllm import SamplingParams

    from parscale.compat.vllm import BatchUpdate, VllmConfig

STREAMS_ARGUMENT = "parscale_streams"  # in the extra arguments of a request


class RequestOptions(NamedTuple):
    """What a request asks for.

    Attributes:
        single: to run with one stream.
        prompt: predictions of its prompt's tokens.
    """

    single: bool = False
    prompt: bool = False

    @classmethod
    def of(cls, sampling_params: SamplingParams) -> RequestOptions:
        """What a request's parameters say."""
        prompt = sampling_params.prompt_logprobs is not None or sampling_params.prompt_logprob_token_ids is not None
        return cls((sampling_params.extra_args or {}).get(STREAMS_ARGUMENT) is not None, prompt)


def check(sampling_params: SamplingParams) -> None:
    """Refuses a number of streams that a request cannot have.

    Raises:
        ValueError: it is another than 1.
    """
    value = (sampling_params.extra_args or {}).get(STREAMS_ARGUMENT)
    if value is not None and (isinstance(value, bool) or value != 1):
        raise ValueError(
            f"{STREAMS_ARGUMENT} is 1, for the plain backbone without streams, and was {value!r}: leave it out "
            "for all streams."
        )


def check_own_keys(sampling_params: SamplingParams) -> None:
    """Refuses any number of streams, for streams with keys and values of their own.

    Raises:
        ValueError: there is one.
    """
    value = (sampling_params.extra_args or {}).get(STREAMS_ARGUMENT)
    if value is not None:
        raise ValueError(
            f"{STREAMS_ARGUMENT} was {value!r}, but the streams of this folder have keys of their own, and only those "
            "of kv='shared' answer a single request with one stream: leave it out."
        )


class BatchOptions:
    """What the requests in the batch of Model Runner V1 ask for, by their place in it."""

    def __init__(self) -> None:
        self.held: dict[int, RequestOptions] = {}

    def update(self, batch_update: BatchUpdate) -> None:
        """Follows the requests that have gone, come and moved, in this order, as vLLM wants it."""
        for index in batch_update.removed:
            self.held.pop(index, None)
        for index, params, *_ in batch_update.added:
            self.held[index] = RequestOptions.of(params)
        for old, new, direction in batch_update.moved:
            moved, other = self.held.pop(old, None), self.held.pop(new, None)
            if moved is not None:
                self.held[new] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self.held[old] = other

    def of(self, number: int) -> list[RequestOptions]:
        """Those of the first `number` requests; a run that serves none (a warm-up) has the default ones."""
        return [self.held.get(index, RequestOptions()) for index in range(number)]


# By the identity of vLLM's configuration, which the processor and the model both hold.
_BATCHES: WeakValueDictionary[int, BatchOptions] = WeakValueDictionary()


def batch_options(vllm_config: VllmConfig) -> BatchOptions:
    """The options of an engine's requests, which its logits processor notes and its model reads."""
    found = _BATCHES.get(id(vllm_config))
    if found is None:
        found = _BATCHES[id(vllm_config)] = BatchOptions()
    return found


class OptionsProcessorV1(LogitsProcessorV1):
    """Changes no logits: it notes what each request asks for.

    Args:
        vllm_config: vLLM's.
        device: unused.
        is_pin_memory: unused.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.options = batch_options(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """As vLLM calls it for each request, in its front end."""
        check(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """So that greedy requests leave it out."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each forward pass."""
        if batch_update is not None:
            self.options.update(batch_update)


class OptionsProcessorV2(LogitsProcessorV2):
    """The same for Model Runner V2, which needs it for the check alone."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """As vLLM calls it for each request, in its front end."""
        check(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """No logits of any request are changed."""
        return False

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The logits as they are."""
        return logits


class _OwnKeys:
    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """As vLLM calls it for each request, in its front end."""
        check_own_keys(sampling_params)


class OwnKeysProcessorV1(_OwnKeys, OptionsProcessorV1):
    """For streams with keys and values of their own, whose requests have no options."""


class OwnKeysProcessorV2(_OwnKeys, OptionsProcessorV2):
    """The same for Model Runner V2."""
