"""The parallel scaling law: its fit, its cost model and the published points.

Importing it does not import torch; only `sweep` needs torch.
"""

from parscale.scaling_laws.configs import read_shape
from parscale.scaling_laws.costs import Cost, cost
from parscale.scaling_laws.data import Points, published, read_points
from parscale.scaling_laws.fitting import Fit, fit, fit_form
from parscale.scaling_laws.hardware import Hardware, known_hardware, read_hardware
from parscale.scaling_laws.holdout import compare, leave_one_out
from parscale.scaling_laws.law import ParallelScalingLaw
from parscale.scaling_laws.plan import Plan, frontier, optimal
from parscale.scaling_laws.shapes import Attention, ModelShape, published_models
from parscale.scaling_laws.training_memory import TrainingMemory, known_backbones, training_memory
from parscale.scaling_laws.worth import crossover, dense_equivalent, versus

__all__ = [
    "Attention",
    "Cost",
    "Fit",
    "Hardware",
    "ModelShape",
    "ParallelScalingLaw",
    "Plan",
    "Points",
    "TrainingMemory",
    "compare",
    "cost",
    "crossover",
    "dense_equivalent",
    "fit",
    "fit_form",
    "frontier",
    "known_backbones",
    "known_hardware",
    "leave_one_out",
    "optimal",
    "published",
    "published_models",
    "read_hardware",
    "read_points",
    "read_shape",
    "training_memory",
    "versus",
]
