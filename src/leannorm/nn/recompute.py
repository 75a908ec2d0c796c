"""Tell the recomputation of a checkpointed forward from the forward itself."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as `torch.utils.checkpoint` recomputes it.

    Under `torch.compile` the answer is False: the compiler's own recomputation repeats no buffer update.
    """
    return not torch.compiler.is_compiling() and in_backward()


def in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1
