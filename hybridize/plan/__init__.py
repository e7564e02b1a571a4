"""The plan: recipe + config.json + tensor headers -> which layer gets which mixer, and what that costs."""

from hybridize.plan.bill import Bill
from hybridize.plan.conversion_plan import ConversionPlan
from hybridize.plan.planner import CONTEXTS, plan
from hybridize.plan.weights import check_teacher_tensors

__all__ = ["CONTEXTS", "Bill", "ConversionPlan", "check_teacher_tensors", "plan"]
