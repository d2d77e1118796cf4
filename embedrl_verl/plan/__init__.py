# SPDX-License-Identifier: Apache-2.0
"""What a run would do, with which numbers, without starting anything."""

from embedrl_verl.config.batch import BatchPlan
from embedrl_verl.plan.plan import Plan, make_plan, print_plan

__all__ = ["BatchPlan", "Plan", "make_plan", "print_plan"]
