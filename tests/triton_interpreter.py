"""Triton's kernels on CPU tensors, in its interpreter, where there is no GPU; `conftest` sets the switch.

Four things of the interpreter are mended: how it rounds, how it adds up, how long it takes, and that the one of Triton
3.6 reads the bounds of a loop in a way that NumPy 2.4 refuses. On a GPU as there, `poisoned` memory shows what was not
written.
"""

from contextlib import contextmanager
from types import FunctionType

import numpy as np
import torch

from leannorm.backends.triton import geometry, launchers

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

if not ON_GPU:
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _convert_as_hardware_does(values, source, target, rounding):
        """Round float32 to the nearest bfloat16, ties to even; Triton's interpreter truncates."""
        if (source.name, target.name) == ("fp32", "bf16"):
            rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (source.name, target.name) == ("bf16", "fp32"):
            return values.astype(np.uint32) << 16
        return _convert(values, source, target, rounding)

    def _sum_as_hardware_does(self, values):
        """Add halves to halves, where NumPy would add up one after the other."""
        data = np.moveaxis(values.handle.data, self.axis, 0)
        while len(data) > 1:
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        return self.to_tensor(data[0], values.dtype)

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_index(tensor, scope):
        """Take an array of one element as the bound of a loop, as later Tritons do."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    _patch, _patched = interpreter._patch_lang, set()

    def _patch_once(function):
        """Prepare a module's functions once, not at each call: kernels alone undo it, and prepare anew."""
        if isinstance(function, FunctionType) and id(function.__globals__) not in _patched:
            _patched.add(id(function.__globals__))
            _patch(function)

    def _call(self, *args, **kwargs):
        _patch_once(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.ReduceOps.sum = _sum_as_hardware_does
    interpreter._patch_lang_tensor = _patch_index
    interpreter._convert_float = _convert_as_hardware_does
    interpreter.InterpretedFunction.__call__ = _call


@contextmanager
def poisoned():
    """Fill what is allocated with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


__all__ = ["DEVICE", "ON_GPU", "geometry", "launchers", "poisoned"]
