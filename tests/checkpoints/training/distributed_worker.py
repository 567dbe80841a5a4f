"""`train` in one of several processes, as `accelerate launch` would start it; takes its runs as one JSON argument.

A run with `refused` ends in a `ValueError` that says so. With `apart` each process has a working folder of its own.
"""

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from parscale import ParScaleConfig
from parscale.checkpoints.training.new_model import NewModel
from parscale.checkpoints.training.train import TrainSettings, train

HELPERS = Path(__file__).parents[2] / "parscale" / "distributed" / "train.py"


def trained(given):
    """A checkpoint's place, or what a new model is made of."""
    if isinstance(given, str):
        return given
    return NewModel(Path(given["config"]), given["tokenizer"], ParScaleConfig(**given["streams"]), given["seed"])


def own_folder(parent):
    """Changes the working folder for a block, to one that only this process has."""
    folder = Path(parent, os.environ["RANK"])
    folder.mkdir(parents=True, exist_ok=True)
    return contextlib.chdir(folder)


def main():
    spec = importlib.util.spec_from_file_location("distributed_train", HELPERS)
    helpers = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = helpers
    spec.loader.exec_module(helpers)
    helpers.load_on_cpus()
    (helpers.zero3_on_cpus if "ACCELERATE_USE_DEEPSPEED" in os.environ else helpers.fsdp_on_cpus)()
    for run in json.loads(sys.argv[1]):
        refused = pytest.raises(ValueError, match=run["refused"]) if "refused" in run else contextlib.nullcontext()
        with own_folder(run["apart"]) if "apart" in run else contextlib.nullcontext(), refused:
            train(
                trained(run["checkpoint"]), Path(run["output"]), TrainSettings(**run["settings"]), resume=run["resume"]
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
