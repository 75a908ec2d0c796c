"""Model transforms while training: they change the model in place, share its parameters, and report what they did."""

from leannorm.conversion.explanation import explain
from leannorm.conversion.freezing import freeze, unfreeze
from leannorm.conversion.fusion import fuse
from leannorm.conversion.recalibration import recalibrate
from leannorm.conversion.swap import convert, revert
from leannorm.conversion.tuning import tune

__all__ = ["convert", "explain", "freeze", "fuse", "recalibrate", "revert", "tune", "unfreeze"]
