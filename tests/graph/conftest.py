from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def randomized():
    """Put a model into eval mode with statistics and parameters of batch normalization that no default hides."""

    def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in model.modules():
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    continue
                if module.running_mean is not None:
                    module.running_mean.normal_(generator=generator)
                    module.running_var.uniform_(0.5, 2.0, generator=generator)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(generator=generator)
        return model.eval()

    return randomize
