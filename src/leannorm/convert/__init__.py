"""Model transforms while training: they change the model in place, share its parameters, and report what they did."""

from leannorm.convert.freezing import freeze, unfreeze
from leannorm.convert.recalibration import recalibrate
from leannorm.convert.swap import convert, revert

__all__ = ["convert", "freeze", "recalibrate", "revert", "unfreeze"]
