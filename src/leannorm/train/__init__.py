"""Training: models by name, image data by name, and the Lightning run that ties them to a source of statistics.

Importing this package checks that torchvision is installed, and makes it importable where its compiled operators cannot
load beside this torch (timm, torchmetrics and Lightning import it too). Models and the environment need no Lightning.
"""

from __future__ import annotations

from leannorm.train.models import define_missing_operators, require

require("torchvision", extra="train")
define_missing_operators()
