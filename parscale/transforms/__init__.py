"""How the streams of a set differ: three transforms, of the input or of the layers that read it, and how they start.

- `prefix`: learned keys and values before those of each attention layer (models with attention; the paper's method)
- `prompt`: learned embeddings before those of the input (models that read token ids)
- `lora`: a low-rank difference in each linear layer (any model)
- `shared`: streams with a prefix or low-rank differences that share keys and values
- `base`: the common parts of the transforms
- `inits`: how a set starts

Chen et al., arXiv 2505.10475, found nearly equal losses for the three; the number of streams matters more.

May import: `attention`, `streams` and what is below them.
"""

from __future__ import annotations

from parscale.config import LORA, PREFIX, PROMPT, ParScaleConfig
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState
from parscale.transforms.base import ModelTransform
from parscale.transforms.lora import LoraTransform
from parscale.transforms.prefix import PrefixTransform
from parscale.transforms.prompt import PromptTransform
from parscale.transforms.shared import SharedLoraTransform, SharedPrefixTransform

CLASSES: dict[str, type[ModelTransform]] = {PREFIX: PrefixTransform, PROMPT: PromptTransform, LORA: LoraTransform}
SHARED_CLASSES: dict[str, type[ModelTransform]] = {PREFIX: SharedPrefixTransform, LORA: SharedLoraTransform}


def make_set(state: ParScaleState, name: str, config: ParScaleConfig, copy: int = 0) -> StreamSet:
    """Makes a set of streams, with the transform that its configuration names, without adding it to the model.

    Args:
        state: the model's state.
        name: the set's name.
        config: its configuration.
        copy: number of a copy of the set for an adapter; 0 is the set itself.
    """
    streams = StreamSet(name, config, copy)
    classes = SHARED_CLASSES if streams.shares_keys else CLASSES
    streams.transform = classes[config.transform](state, streams)
    return streams
