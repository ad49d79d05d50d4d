"""The cost model: what a step, a burst and a length distribution cost with a layout of the cache, and which layout to
choose (README.md). Arithmetic over the numbers of a card (calibration.py); it imports neither torch nor a driver."""

from trtllm_vattn.planner.calibration import Calibration
from trtllm_vattn.planner.choose import Objective, Plan, Prediction, plan
from trtllm_vattn.planner.lengths import Lengths
from trtllm_vattn.planner.memory import Layout
from trtllm_vattn.planner.shape import ModelShape
from trtllm_vattn.planner.time import CostModel, Load

__all__ = [
    "Calibration",
    "CostModel",
    "Layout",
    "Lengths",
    "Load",
    "ModelShape",
    "Objective",
    "Plan",
    "Prediction",
    "plan",
]
