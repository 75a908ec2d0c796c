"""The precision plan: a number format a layer, chosen by ranges and measured errors, written, run and verified."""

from leannorm.deploy.precision.execution import execute_plan
from leannorm.deploy.precision.plan import plan_precision
from leannorm.deploy.precision.support import emulated_types, support

__all__ = ["emulated_types", "execute_plan", "plan_precision", "support"]
