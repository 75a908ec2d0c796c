"""Shipping: export, verification in the runtime that ships, and the whole of `leannorm deploy`.

`deploy` is loaded when it is asked for, so that `leannorm.verify` needs neither onnx nor onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leannorm.deploy.shipping import deploy

__all__ = ["deploy"]


def __getattr__(name: str) -> Any:
    if name == "deploy":
        from leannorm.deploy.shipping import deploy

        return deploy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
