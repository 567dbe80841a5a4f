"""The checks when vLLM starts on a checkpoint with streams: which set to serve, and whether it is supported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from vllm import ModelRegistry

from parscale.compat.vllm import (
    MODELS_CONFIG_MAP,
    TRANSFORMERS_BACKEND_MODELS,
    AttentionBackendEnum,
    CUDAGraphMode,
    VerifyAndUpdateConfig,
    before_inspection,
    init_logger,
    is_breakable_cudagraph_enabled,
)
from parscale.config import (
    DEFAULT_SET,
    KV,
    NUM_STREAMS,
    PREFIX,
    PREFIX_LENGTH,
    SET_NAME,
    SHARED,
    SMOOTHING,
    ParScaleConfig,
)
from parscale.format.checks import check_streams
from parscale.format.folders import CONFIG, INFIX, STREAMS_CONFIG, STREAMS_FILE, Checkpoint, set_names, stream_config
from parscale.format.headers import StoredTensor
from parscale.streams.choosing import no_such_set
from parscale.streams.naming import TRANSFORM_PART, part_of

if TYPE_CHECKING:
    from parscale.compat.vllm import ModelConfig, VllmConfig

logger = init_logger("vllm.parscale")

# The key, in the configuration that vLLM passes to its processes, of the number of cache slots before a request; 0 if
# the prefix is attended to separately.
SLOTS = "prefix_slots"

# The attention backends that take the number of heads from the layers, or do not depend on it.
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "ROCM_ATTN", "CPU_ATTN")


def serve(architecture: str) -> None:
    """Makes an architecture known to vLLM, of `parscale.integrations.vllm.models` and of `shared_models`.

    vLLM then calls `prepare` for it.
    """
    ModelRegistry.register_model(architecture, f"parscale.integrations.vllm.models:{architecture}")
    shared = _sharing(architecture)
    ModelRegistry.register_model(shared, f"parscale.integrations.vllm.shared_models:{shared}")
    MODELS_CONFIG_MAP[architecture] = _Prepared
    TRANSFORMERS_BACKEND_MODELS[architecture] = (__name__, architecture)


def refuse_unprepared(architectures: Collection[str]) -> None:
    """Makes vLLM refuse these architectures where it would not call `prepare`: with terratorch, and as draft models."""

    def check(names: list[str], model_config: ModelConfig) -> None:
        if set(names).isdisjoint(architectures):
            return
        _require_none({"--model-impl terratorch": model_config.model_impl == "terratorch"})
        if model_config.runner == "draft":
            raise ValueError(
                f"The model of --speculative-config, {model_config.model}, has parallel streams, and a model with "
                "streams cannot draft in vLLM: give a plain model."
            )

    before_inspection(check)


class _Prepared(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        prepare(vllm_config)


def _sharing(architecture: str) -> str:
    """The name by which vLLM knows an architecture whose streams share keys and values."""
    return architecture.replace(INFIX, f"{INFIX}Shared")


def prepare(vllm_config: VllmConfig) -> None:
    """Checks a checkpoint and vLLM's settings, and sets what the streams need.

    With one stream the model is the plain backbone, and vLLM's own class serves it.

    Args:
        vllm_config: vLLM's; its model configuration gets the values of the chosen set.

    Raises:
        ValueError: the checkpoint or a setting is not supported; the message names it and what to do.
        OSError: a file of the checkpoint is missing.
    """
    model = vllm_config.model_config
    config = model.hf_config
    checkpoint = checkpoint_of(vllm_config)
    _require_none({"--model-impl transformers": model.model_impl == "transformers"})
    name, fields = getattr(config, SET_NAME, DEFAULT_SET), checkpoint.read_json(CONFIG)
    _check_overrides(checkpoint, fields, config)
    streams, further = _chosen_set(checkpoint, fields, name)
    if vllm_config.load_config.load_format != "dummy":
        check_streams(checkpoint, streams, _tensors(checkpoint) if further is None else further.streams())
    _check_compressed(checkpoint, config)
    if streams.num_streams == 1:
        if further is not None:
            raise ValueError(f"The set {name!r} of {checkpoint} has one stream: serve the backbone itself.")
        _rename(model, lambda name: name.replace(INFIX, ""))
        return
    if streams.transform != PREFIX:
        raise ValueError(
            f"The streams of {checkpoint} are made by transform={streams.transform!r}, and vLLM serves those of "
            f"{PREFIX!r} only: `transformers serve --trust-remote-code` serves any."
        )
    _check_settings(vllm_config)
    setattr(config, NUM_STREAMS, streams.num_streams)
    setattr(config, PREFIX_LENGTH, streams.prefix_length)
    setattr(config, SMOOTHING, streams.smoothing)
    setattr(config, KV, streams.kv)
    if streams.kv == SHARED:
        _prepare_shared(vllm_config)
        where = "apart from the cache, which all share"
    else:
        _keep_sums_apart(vllm_config)
        is_refused = _refuse_one_stream(vllm_config)
        num_slots = 0 if _has_window(vllm_config) else streams.prefix_length
        setattr(config, SLOTS, num_slots)
        if num_slots:
            _make_room(vllm_config, num_slots)
        if num_slots or not is_refused:  # the engine's scheduler adds the slots, and warns of one stream
            vllm_config.scheduler_config.scheduler_cls = "parscale.integrations.vllm.scheduler.own_keys_scheduler"
        where = "in slots of the cache" if num_slots else "apart from the cache"
    logger.info("%d parallel streams, with prefixes of %d tokens %s", streams.num_streams, streams.prefix_length, where)


def _rename(model_config: ModelConfig, rename: Callable[[str], str]) -> None:
    """Has vLLM run another class than the one that the checkpoint names."""
    names = [rename(name) for name in model_config.hf_config.architectures]
    model_config.hf_config.architectures = model_config.model_arch_config.architectures = names


def _make_room(vllm_config: VllmConfig, num_slots: int) -> None:
    """For T slots in front of each request, which the engine's scheduler fills."""
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    # A window as long as the longest text hides nothing of it, and must not hide the slots either.
    model.hf_config.sliding_window = vllm_config.cache_config.sliding_window = None
    model.max_model_len += num_slots
    if not scheduler.enable_chunked_prefill:
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, model.max_model_len)


def _keep_sums_apart(vllm_config: VllmConfig) -> None:
    """Has vLLM not fuse sums over processes with norms: it takes their rows for tokens, and a token has P of them."""
    passes = vllm_config.compilation_config.pass_config
    option = "fuse_allreduce_rms in --compilation-config's pass_config with own keys and values"
    _require_none({option: bool(passes.fuse_allreduce_rms)})
    passes.fuse_allreduce_rms = False


def _prepare_shared(vllm_config: VllmConfig) -> None:
    """For streams that share keys: their classes, and how a worker learns what each request asks for."""
    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    is_v2 = vllm_config.use_v2_model_runner
    _require_none(
        {
            "--speculative-config with shared keys and values": vllm_config.speculative_config is not None,
            "--enable-dbo": vllm_config.parallel_config.use_ubatching,
            "VLLM_USE_BREAKABLE_CUDAGRAPH": is_breakable_cudagraph_enabled(),
        }
    )
    _rename(model, _sharing)
    _add_processor(vllm_config, "OptionsProcessor")
    if is_v2:
        return
    if compilation.cudagraph_mode is None or compilation.cudagraph_mode.has_full_cudagraphs():
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE  # a whole graph would not ask what the requests want


def _refuse_one_stream(vllm_config: VllmConfig) -> bool:
    """Has the front end refuse requests for one stream, where vLLM allows a logits processor and it costs nothing.

    Model Runner V1 allows none beside speculative decoding, and on GPUs its steps would wait for each other's tokens;
    V2 allows none where it returns what it sampled from.

    Returns:
        Whether it does.
    """
    if vllm_config.use_v2_model_runner:
        is_free = not vllm_config.model_config.return_sampling_mask
    else:
        is_free = vllm_config.speculative_config is None and vllm_config.device_config.device_type == "cpu"
    if is_free:
        _add_processor(vllm_config, "OwnKeysProcessor")
    return is_free


def _add_processor(vllm_config: VllmConfig, name: str) -> None:
    """Adds a logits processor of `parscale.integrations.vllm.sampling`, in the form for the model runner."""
    model, version = vllm_config.model_config, "V2" if vllm_config.use_v2_model_runner else "V1"
    processor = f"parscale.integrations.vllm.sampling:{name}{version}"
    model.logits_processors = [*(model.logits_processors or ()), processor]


def checkpoint_of(vllm_config: VllmConfig) -> Checkpoint:
    """The folder or repository that vLLM was started on."""
    model = vllm_config.model_config
    folder, token = vllm_config.load_config.download_dir, model.hf_token or None
    return Checkpoint(model.model, revision=model.revision, cache_dir=folder, token=token)


def further_streams(checkpoint: Checkpoint, config: PreTrainedConfig) -> Path | None:
    """The file with the streams that `config` selects; `None` if they are among the model's tensors."""
    name = getattr(config, SET_NAME, DEFAULT_SET)
    active, _ = set_names(checkpoint, checkpoint.read_json(CONFIG))
    return None if name == active else checkpoint.inside(name).file(STREAMS_FILE)


def quantize_attention(vllm_config: VllmConfig) -> None:
    """Makes vLLM quantize the layers inside attention modules, which it would skip because of their prefix.

    If the configuration of an AWQ checkpoint does not list the modules that are not quantized, vLLM lists all modules
    that hold a floating-point tensor. `self_attn` with its `prefix_k` is one of them, and vLLM skips all that is
    inside.
    """
    config = vllm_config.quant_config
    given = getattr(vllm_config.model_config.hf_config, "quantization_config", None) or {}
    listed = getattr(config, "modules_to_not_convert", None)
    if listed and not given.get("modules_to_not_convert"):
        names = [name for name in checkpoint_of(vllm_config).weights() if part_of(name) == TRANSFORM_PART]
        holders = {name.rpartition(".")[0] for name in names}
        config.modules_to_not_convert = [name for name in listed if name not in holders]


def _check_overrides(checkpoint: Checkpoint, fields: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Raises an error for fields of the streams that --hf-overrides has changed, and which would be ignored."""
    given = {key: value for key, value in vars(config).items() if key.startswith("parscale_") and key != SET_NAME}
    if changed := [key for key, value in given.items() if value != fields.get(key)]:
        raise ValueError(
            f"--hf-overrides cannot set {' and '.join(changed)}: streams are served as {CONFIG} of {checkpoint} says. "
            f"Leave it out; what can be chosen is a set, by {SET_NAME}."
        )


def _chosen_set(
    checkpoint: Checkpoint, fields: Mapping[str, Any], name: object
) -> tuple[ParScaleConfig, Checkpoint | None]:
    """The configuration of a set of streams, and where it lies; `None` if it is the active set of its folder."""
    active, further = set_names(checkpoint, fields)
    if name == active:
        return stream_config(checkpoint, fields), None
    if name not in further:
        how = f""": choose one by --hf-overrides '{{"{SET_NAME}": "NAME"}}'."""
        raise no_such_set(name, [active, *further], how, checkpoint)
    inside = checkpoint.inside(name)
    return stream_config(inside, inside.read_json(STREAMS_CONFIG)), inside


def _tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Those of the active set."""
    return {name: tensor for name, tensor in checkpoint.weights().items() if part_of(name)}


def _has_window(vllm_config: VllmConfig) -> bool:
    """Whether a layer has a window shorter than the longest text."""
    config = vllm_config.model_config.hf_config
    window = vllm_config.cache_config.sliding_window
    if window is None and "sliding_attention" in (getattr(config, "layer_types", None) or []):
        window = config.sliding_window
    return window is not None and window < vllm_config.model_config.max_model_len


def _check_compressed(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Raises an error for uncompressed weights that vLLM would silently read as compressed ones."""
    if (getattr(config, "quantization_config", None) or {}).get("quantization_status") == "decompressed":
        raise ValueError(
            f"{checkpoint} was saved after its weights had been decompressed, and vLLM reads compressed ones: call "
            "model.hf_quantizer.compressor.compress_model(model) before save_pretrained."
        )


def check_backend(backend: type) -> None:
    """Raises an error for an attention backend that would use the backbone's number of heads, not P times as many.

    The check is by class: AITER's flash attention calls itself `FLASH_ATTN`.

    Raises:
        ValueError: the backend is not known to read the number from the layers; the message lists those that do.
    """
    name = f"{backend.__module__}.{backend.__qualname__}"
    if name not in {AttentionBackendEnum[served].value for served in BACKENDS}:
        raise ValueError(
            f"Models with parallel streams have P times the backbone's heads in each layer, and the attention backend "
            f"that vLLM has chosen, {name}, is not known to take them: give --attention-backend "
            f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, as the hardware allows."
        )


def _check_settings(vllm_config: VllmConfig) -> None:
    """Raises an error for settings without support for streams, which could silently give wrong results."""
    model, parallel, speculative = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    scheme = (getattr(model.hf_config, "quantization_config", None) or {}).get("kv_cache_scheme")
    refused = {
        f"--runner {model.runner_type}": model.runner_type != "generate" or model.convert_type != "none",
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--enable-lora": vllm_config.lora_config is not None,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--scheduler-cls": vllm_config.scheduler_config.scheduler_cls is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--kv-offloading-size": vllm_config.cache_config.kv_offloading_size is not None,
        "--speculative-config, but for the method 'ngram'": speculative is not None and speculative.method != "ngram",
        "Llama 4's scaling of the attention": getattr(model.hf_config, "llama_4_scaling", None) is not None,
        "dual chunk attention": getattr(model.hf_config, "dual_chunk_attention_config", None) is not None,
        "a scale of the cache for each head": isinstance(scheme, dict) and scheme.get("strategy") == "attn_head",
    }
    _require_none(refused)


def _require_none(settings: Mapping[str, bool]) -> None:
    """Raises an error if any of the settings is given.

    Raises:
        ValueError: some are; it names them.
    """
    given = [name for name, is_given in settings.items() if is_given]
    if given:
        raise ValueError(f"Models with parallel streams are served without {' and '.join(given)}: leave it out.")
