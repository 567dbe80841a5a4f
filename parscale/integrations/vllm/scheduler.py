"""The engine's scheduler for streams with keys of their own, with T leading slots before each request for the prefix.

It runs behind vLLM's front end, which counts, limits and returns only the user's tokens. With prefix caching, the
slots of all requests share the same blocks of the cache, as far as they fill whole blocks. Models with a window have no
slots; their scheduler warns of requests for one stream, where no logits processor has refused them.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from parscale.compat.vllm import AsyncScheduler, LogprobsTensors, Scheduler, init_logger, put_in_front
from parscale.integrations.vllm.sampling import STREAMS_ARGUMENT, RequestOptions
from parscale.integrations.vllm.startup import SLOTS

if TYPE_CHECKING:
    from parscale.compat.vllm import (
        EngineCoreOutputs,
        ModelRunnerOutput,
        PrefillStats,
        Request,
        SchedulerOutput,
        VllmConfig,
    )

logger = init_logger("vllm.parscale.scheduler")

SLOT = 0  # the token in a slot: any valid id, since the model never reads it


class _OwnKeysScheduler(Scheduler):
    """The common part of both schedulers.

    `parscale.integrations.vllm.startup.prepare` has reserved room for the slots, if there are any.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model_config = self.vllm_config.model_config
        self.num_slots: int = getattr(model_config.hf_config, SLOTS)
        # The engine has allocated the cache for this length. The rest after the slots is the user's: the engine reports
        # it to the front end as its limit.
        model_config.max_model_len -= self.num_slots

    def add_request(self, request: Request) -> None:
        """Puts the slots before a new request; a request that continues with more input has them already."""
        if request.request_id not in self.requests:
            sampling = request.sampling_params
            if sampling is not None and RequestOptions.of(sampling).single:
                logger.warning_once(
                    "%s of a request is ignored: streams with keys of their own all answer.", STREAMS_ARGUMENT
                )
            if self.num_slots:
                _add_slots(request, self.num_slots)
        super().add_request(request)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As in vLLM, without the slots in what goes to the user."""
        T = self.num_slots
        if not T:
            return super().update_from_output(scheduler_output, model_runner_output)
        tensors = model_runner_output.prompt_logprobs_dict
        for name, whole in tensors.items():
            if whole is not None:
                # (T + S - 1, k) to (S - 1, k): the row before that of the first token predicts this token
                tensors[name] = LogprobsTensors(*(part[T:] for part in whole[:3]))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for output in chain.from_iterable(one.outputs for one in outputs.values()):
            if output.prefill_stats is not None:
                _take_out(output.prefill_stats, T)
        return outputs


class _AsyncOwnKeysScheduler(_OwnKeysScheduler, AsyncScheduler):
    pass


def own_keys_scheduler(*, vllm_config: VllmConfig, **others: Any) -> Scheduler:
    """The callable that vLLM uses in place of its scheduler class."""
    scheduler = _AsyncOwnKeysScheduler if vllm_config.scheduler_config.async_scheduling else _OwnKeysScheduler
    return scheduler(vllm_config=vllm_config, **others)


def _add_slots(request: Request, num_slots: int) -> None:
    sampling = request.sampling_params
    # A repetition penalty counts the prompt's tokens, so the slots repeat a token of the prompt.
    penalised = sampling is not None and sampling.repetition_penalty != 1.0
    if sampling is not None and sampling.prompt_logprob_token_ids is not None:
        request.sampling_params = sampling.clone()
        request.sampling_params.prompt_logprob_start = (sampling.prompt_logprob_start or 0) + num_slots
    put_in_front(request, [request.prompt_token_ids[0] if penalised else SLOT] * num_slots)


def _take_out(stats: PrefillStats, num_slots: int) -> None:
    new_slots = max(0, num_slots - stats.num_cached_tokens)  # those that were not found in the cache, but computed
    stats.num_prompt_tokens -= num_slots
    stats.num_cached_tokens = max(0, stats.num_cached_tokens - num_slots)
    stats.num_local_cached_tokens = max(0, stats.num_local_cached_tokens - num_slots)
    stats.num_computed_tokens = stats.num_prompt_tokens - stats.num_cached_tokens
    stats.num_cache_creation_tokens = max(0, stats.num_cache_creation_tokens - new_slots)
