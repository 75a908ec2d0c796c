import os

import hypothesis
import torch

if not torch.cuda.is_available():  # before Triton is imported: its own functions are decorated then
    os.environ["TRITON_INTERPRET"] = "1"
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)
