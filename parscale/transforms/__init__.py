"""What makes the streams of one set differ: three transforms of the input or of the layers that read it.

========== ================================================================= ======================================
``prefix`` keys and values in front of those of each attention layer         models with attention; the paper's own
``prompt`` embeddings in front of those of the input                         models that read token ids
``lora``   a low-rank difference to each linear layer                        any
========== ================================================================= ======================================

Chen et al., arXiv 2505.10475, found them nearly equal in loss; the number of streams matters more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parscale.config import LORA, PREFIX, PROMPT
from parscale.transforms.base import Place, Transform
from parscale.transforms.lora import LoraTransform
from parscale.transforms.prefix import PrefixTransform
from parscale.transforms.prompt import PromptTransform

if TYPE_CHECKING:
    from parscale.streams.state import ParScaleState, StreamSet

CLASSES: dict[str, type[Transform]] = {PREFIX: PrefixTransform, PROMPT: PromptTransform, LORA: LoraTransform}


def make_transform(state: ParScaleState, streams: StreamSet) -> Transform:
    """The transform that a set of streams names."""
    return CLASSES[streams.config.transform](state, streams)


__all__ = ["Place", "Transform", "make_transform"]
