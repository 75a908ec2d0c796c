"""Training: models by name, image data by name, and the Lightning run that ties them to a source of statistics.

Importing this package checks that the `train` extra is installed, and makes torchvision importable where its compiled
operators cannot load beside this torch (torchvision, timm, torchmetrics and Lightning all import it).
"""

from __future__ import annotations

from leannorm.train.models import define_missing_operators, require

require("torchvision", extra="train")
require("lightning", extra="train")
define_missing_operators()
