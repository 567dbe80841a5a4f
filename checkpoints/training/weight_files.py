"""Saves the weights that a run trains, loads them back, and merges them into the checkpoint that the run started from.

What is trained, and its format on disk:

- the streams of a frozen backbone: a streams-only folder
- an adapter and the streams: an adapter's folder, with the streams in it
- everything: a full checkpoint, or a plain model's folder where there are no streams

`parscale.load`, PEFT or transformers can read each of them, so a run can be inspected before its end. The commands read
no adapter: `parscale.checkpoints.models.require_merged` says how to merge it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from parscale.checkpoints.finite_values import first_not_finite
from parscale.checkpoints.models import load_any
from parscale.checkpoints.training.new_model import NewModel
from parscale.format.folders import CONFIG, STREAMS_FILE, STREAMS_ONLY, Checkpoint
from parscale.format.pretrained import ADAPTER, read_adapter
from parscale.streams.naming import part_of


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has an adapter on it, from `peft.get_peft_model`."""
    return not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model")


def trains_streams_only(model: nn.Module) -> bool:
    """Whether only parameters of streams are trainable."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(part_of(name) for name in trained)


def has_streams(model: nn.Module) -> bool:
    """Whether streams are active in a model, also under an adapter."""
    return getattr(model, "num_streams", 1) > 1


def save_trained(
    model: Any, folder: Path, state_dict: dict[str, Any] | None = None, *, is_main_process: bool = True
) -> None:
    """Saves the trained weights. If the model is sharded, every process calls it; the main process writes.

    Args:
        model: wrapped or plain, with or without an adapter.
        folder: an existing folder.
        state_dict: the model's gathered state dict, if its own tensors are sharded.
        is_main_process: whether this process writes.
    """
    if is_adapted(model):  # with its streams
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=is_main_process)
    elif trains_streams_only(model):
        model.save_streams(folder)
    elif is_main_process:
        model.save_pretrained(folder, state_dict=state_dict)


def load_trained(model: Any, folder: Path) -> None:
    """Loads the files of `save_trained` into a model of the same kind, in the dtypes of the model."""
    if (folder / ADAPTER).exists():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / ADAPTER))
        model = model.get_base_model()
        if not has_streams(model):
            return
    if (folder / STREAMS_FILE).exists() and not (folder / CONFIG).exists():
        _copy(model.parscale.tensors(model.parscale.active), load_file(folder / STREAMS_FILE))
    else:
        other = load_any(str(folder), dtype=torch.float32)
        _copy(dict(model.named_parameters()), dict(other.named_parameters()))


def put_together(checkpoint: str | NewModel, trained: Path, output: Path) -> None:
    """Puts what was trained into the checkpoint that it was trained on, and saves it as one of the same kind.

    Args:
        checkpoint: a full one, streams only, a plain model or a new one, as it was before the run.
        trained: a folder that `save_trained` wrote.
        output: the folder to save in; each tensor has the dtype that it has in `checkpoint`, in a new model that of
            its configuration.

    Raises:
        ValueError: a trained value is too large for its dtype.
    """
    model = checkpoint.make() if isinstance(checkpoint, NewModel) else load_any(checkpoint)
    if (trained / ADAPTER).exists():
        model = read_adapter(model, trained).merge_and_unload()
    else:
        load_trained(model, trained)
    if (name := first_not_finite(model.named_parameters())) is not None:
        dtype = str(model.get_parameter(name).dtype).removeprefix("torch.")
        raise ValueError(
            f"The trained values of {name} do not fit into {dtype}, the dtype of {checkpoint}; save that checkpoint in "
            f"bfloat16 or float32 and train it again. The trained values are in float32 in {trained}."
        )
    if not isinstance(checkpoint, NewModel) and Checkpoint(checkpoint).kind() == STREAMS_ONLY:
        model.save_streams(output)
    else:
        model.save_pretrained(output)


@torch.no_grad()
def _copy(into: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    if missing := sorted(into.keys() - values.keys()):
        raise ValueError(f"The checkpoint lacks {', '.join(missing[:3])} and does not fit this model.")
    for name, parameter in into.items():
        parameter.copy_(values[name])
