"""One tiny random model for each causal language model class of the installed transformers.

A configuration is its class's default with every size made small: fields are found by their names, in nested
configurations too, and layers are thinned out until one of each kind is left. A class for which that is not enough has
a line in `SPECIAL`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, HIDDEN, HEADS, HEAD_SIZE, POSITIONS = 96, 32, 4, 8, 64
LAYERS = 2  # at least; a configuration with more kinds of layers has one of each
FIRST_SPECIAL = 80  # ids from here on may stand for images and the like

# A field whose whole name (the standard one, where the class has another) matches gets the value, if its default is a
# positive number. The first match counts.
WINDOW = r"(sliding|local)_(window|attention)(_size)?|window_size|attention_(window|chunk)_size|index_topk"
DEPTH = {r"num_(hidden_|encoder_|decoder_|global_)?layers|(n|encoder|decoder)_layers?|depth|num_blocks": LAYERS}
SIZES: dict[str, int] = {
    WINDOW: 0,  # the argument `window` of `Tiny.config`
    r"(.*_)?vocab_size(_per_layer_input|_base)?|encoder_hash_byte_group_vocab|pronunciation_size": VOCABULARY,
    r"(original_)?max_(position_embeddings|source_positions|target_positions|seq_len)|n_positions|n_ctx": POSITIONS,
    r"context_length|model_max_length": POSITIONS,
    r"hidden_size|(.*_)?(emb|embed|embedding)_(dim|size)|lru_width|attention_hidden_size|d_model": HIDDEN,
    r"(input|output)_embedding_size|word_embed_proj_dim|out_hidden_size|hidden_size_global": HIDDEN,
    r"(moe|expert|(moe_)?shared|shared_experts?)_(intermediate|ffn_hidden)_size|expert_ffn_hidden_size": 16,
    r"(.*_)?(intermediate|ffn_hidden|feed_forward)_size(_mlp)?|(.*_)?ffn_dim|n_inner|d_ff|dff|dim_ff|d_inner": 48,
    r"(.*_)?num_key_value_heads|num_kv_heads|kv_n_heads": 2,
    r"index_n_heads": 16,  # few would often leave all tokens at 0, and which of them is chosen is chance
    r"mamba_(n|num)_heads": 8,
    r"(.*_)?(attention_heads|n_heads?|num_heads)(_per_layer)?|num_query_groups": HEADS,
    r"qk_rope_head_dim|rotary_dim": 4,
    r"(.*_)?(head_dim|d_head|dim_head|kv_channels|d_kv|attention_head_size|headdim)": HEAD_SIZE,
    r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_(k|topk|top_k)": 2,
    r"(num_expert|n|topk|mamba_n)_groups?|mamba_ngroups|first_k_dense_replace|num_dense_layers": 1,
    r"(kv|q|o)_lora_rank": 12,
    r"(.*_)?(d_state|state_size|dt_rank|time_step_rank|rank|lowrank)|hidden_size_per_layer_input": 8,
    r"router_hidden_size|ple_embed_dim": 16,
    r"(.*_)?chunk_(size|length)|block_size": 4,
    **DEPTH,
    r"image_size|crop_size": 8,
    r"patch_size": 4,
    r"num_position_embeddings": 16,
}
# What a class needs beside that: fields of its configuration, those of a nested one in a dictionary.
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GEMMA_3N = _SHARED_KEYS | {
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.0] * 4,
    "altup_num_inputs": 2,
}
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "global_head_dim": 8}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
_NO_LIMIT = {"time_step_min": 1e-9}  # which one step with a cache does not keep
_PYRAMID = {
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "image_size": 16,
}
_BOXES = {"coordinate_size": 6, "shape_size": 4, "input_size": 8}  # 4 coordinates and 2 lengths in `HIDDEN`
_FRAMES = {"frames_per_clip": 4, "pred_num_hidden_layers": LAYERS}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPECIAL: dict[str, dict[str, Any]] = {
    "Blip2ForConditionalGeneration": {"image_token_index": FIRST_SPECIAL},
    "Blip2Model": {"image_token_index": FIRST_SPECIAL},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BltForCausalLM": {"num_hidden_layers": LAYERS},  # transformers' cache asks for it
    "CohereCompassForCausalLM": _WINDOWS
    | {"rope_parameters": {kind: _ROPE | {"mrope_section": [2, 1, 1]} for kind in _WINDOWS["layer_types"]}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "DPTForDepthEstimation": _PYRAMID,
    "DPTForSemanticSegmentation": _PYRAMID,
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DoryForCausalLM": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "initializer_range": 1.0,  # vectors are divided by it, and scores grow with their square
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "Dots1ForCausalLM": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "Dots3NoteForCausalLM": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": _GEMMA_3N,
    "Gemma3nForConditionalGeneration": {"text_config": _GEMMA_3N},
    "Gemma4AssistantForCausalLM": {"text_config": _ASSISTANT},
    "Gemma4ForCausalLM": _SHARED_KEYS | {"global_head_dim": 16},
    "Gemma4ForConditionalGeneration": {"text_config": _SHARED_KEYS | {"global_head_dim": 16}},
    "Gemma4UnifiedAssistantForCausalLM": {"text_config": _ASSISTANT},
    "Gemma4UnifiedForCausalLM": {"global_head_dim": 16},
    "Gemma4UnifiedForConditionalGeneration": {"text_config": {"global_head_dim": 16}},
    "GotOcr2ForConditionalGeneration": {"vision_config": {"output_channels": 16, "mlp_dim": 48}},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "HrmTextForCausalLM": {"num_hidden_layers": 1, "L_cycles": 1},
    "InstructBlipForConditionalGeneration": {"image_token_index": FIRST_SPECIAL},
    "InstructBlipModel": {"image_token_index": FIRST_SPECIAL},
    "InstructBlipVideoForConditionalGeneration": {"video_token_index": FIRST_SPECIAL},
    "InstructBlipVideoModel": {"video_token_index": FIRST_SPECIAL},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "LagunaForCausalLM": _WINDOWS,
    "LayoutLMv3ForQuestionAnswering": _BOXES,
    "LayoutLMv3ForSequenceClassification": _BOXES,
    "LayoutLMv3ForTokenClassification": _BOXES,
    "LayoutLMv3Model": _BOXES,
    "Lfm2ForCausalLM": _CONVOLUTIONS,
    "Lfm2MoeForCausalLM": _CONVOLUTIONS,
    "LongcatFlashForCausalLM": {"head_dim": 4, "qk_head_dim": 12, "zero_expert_num": 2},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MellumForCausalLM": _WINDOWS,
    "MllamaForCausalLM": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "MoshiForCausalLM": {"sliding_window": POSITIONS},  # its cache has the window, its mask has not
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "OwlViTForObjectDetection": {"text_config": {"projection_dim": HIDDEN}, "projection_dim": HIDDEN},
    "Owlv2ForObjectDetection": {"text_config": {"projection_dim": HIDDEN}, "projection_dim": HIDDEN},
    "NemotronForCausalLM": {"head_dim": 8, "num_key_value_heads": 2},
    "NemotronHForCausalLM": _NO_LIMIT,
    "Phi4MultimodalForCausalLM": {"audio_config": {"nemo_conv_channels": 16, "ext_pw_out_channel": 32}},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 96,
        "eos_token_id": 2,
    },
    "ReformerModelWithLMHead": {
        "hash_seed": 0,  # else it hashes otherwise at each call
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 2,
    },
    "VJEPA2ForVideoClassification": _FRAMES,
    "VJEPA2Model": _FRAMES,
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128},  # sizes are rounded up to 64
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": _NO_LIMIT,
    "ZambaForCausalLM": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A class of models.

    Attributes:
        name: of the class.
    """

    name: str

    @property
    def cls(self) -> Any:
        """The class."""
        return getattr(transformers, self.name)

    def config(self, window: int = 6) -> Any:
        """Its configuration.

        Args:
            window: tokens that a sliding window shows, and whatever else hides tokens that are further off.
        """
        return tiny_config(self.cls.config_class, window, SPECIAL.get(self.name, {}))

    def build(self, window: int = 6, seed: int = 0) -> Any:
        """The model in eval mode, in float32, on the CPU; the same weights for a seed, whatever the window."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.cls(self.config(window))
            randomize(model)
        return model.eval()


def names() -> list[str]:
    """The classes of the installed transformers, in the order of the alphabet."""
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return sorted({name for names in classes for name in ((names,) if isinstance(names, str) else names)})


def model_types(name: str) -> list[str]:
    """The model types that a class serves."""
    items = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return sorted(kind for kind, names in items if name in ((names,) if isinstance(names, str) else names))


def tiny_config(cls: Any, window: int, special: dict[str, Any], sizes: dict[str, int] = SIZES) -> Any:
    """The class's default configuration with small sizes.

    Args:
        cls: the configuration's class.
        window: as `Tiny.config`.
        special: fields that are set to other values.
        sizes: what is made small, and how small; `DEPTH` leaves the width as it is.
    """
    nested = {name: value for name, value in special.items() if name in cls.sub_configs}
    default = cls(**nested)
    standard = {own: name for name, own in cls.attribute_map.items()}
    layers = _layers_of_each_kind(default)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = field.name
        value = vars(default)[name] if name in vars(default) else getattr(default, name, None)
        if isinstance(value, PreTrainedConfig):
            fields[name] = tiny_config(type(value), window, special.get(name, {}), sizes)
        elif name not in _OF_EVERY_MODEL:
            small = _small(name, value, window, layers, sizes)
            if small is value and name in standard:
                small = _small(standard[name], value, window, layers, sizes)
            if small is not value:
                fields[name] = small
    if len(layers) > LAYERS:
        fields[cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS  # one latent for all heads
    return cls(**fields | {name: value for name, value in special.items() if name not in nested})


_OF_EVERY_MODEL = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def _layers_of_each_kind(config: Any) -> list[int]:
    """Indices of layers, the first of each kind; two at least."""
    number = getattr(config, "num_hidden_layers", None)
    if not isinstance(number, int):
        return []
    lists = [
        value
        for value in vars(config).values()
        if isinstance(value, (list, tuple)) and len(value) == number and all(isinstance(x, str) for x in value)
    ]
    seen: set[tuple[int, str]] = set()
    chosen = []
    for layer in range(number):
        kinds = {(i, kinds[layer]) for i, kinds in enumerate(lists)}
        if not kinds <= seen:
            chosen.append(layer)
            seen |= kinds
    for layer in range(number):
        if len(chosen) < LAYERS and layer not in chosen:
            chosen.append(layer)
    return sorted(chosen)


def _small(name: str, value: Any, window: int, layers: list[int], sizes: dict[str, int]) -> Any:
    """The small value of a field; the same object where it can stay."""
    if name == "is_decoder":  # encoders that can be decoders
        return True
    if name == "head_dim" and value is None:
        return HEAD_SIZE
    if isinstance(value, (list, tuple)) and layers and len(value) > max(layers) and "token" not in name:
        if len(value) <= LAYERS or not _by_layer(name):
            return value
        return [_small(name, value[layer], window, layers, sizes) for layer in layers]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        return value
    if re.search(r"dropout|pdrop|layerdrop|_drop$|jitter", name):
        return 0.0
    if re.search(r"_token_(id|index)$", name):
        first = {"pad": 0, "bos": 1, "eos": 2}.get(name.split("_")[0])
        if first is not None:
            return first
        return value if value < VOCABULARY else FIRST_SPECIAL + sum(map(ord, name)) % (VOCABULARY - FIRST_SPECIAL)
    for pattern, small in sizes.items():
        if re.fullmatch(pattern, name):
            return min(value, small or window)
    return value


def _by_layer(name: str) -> bool:
    """Whether a list in a field has one entry for each layer."""
    return re.search(r"layer|types|pattern|attention_heads", name) is not None


def randomize(model: nn.Module) -> None:
    """Draws every weight: matrices keep the scale of what passes through, vectors are moved from where they were."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(noise, alpha=0.3)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
