"""What a converted model's own call does before and after its layers: a pair of hooks."""

from __future__ import annotations

from typing import Any

from torch import nn


class Entry:
    """A pair of hooks on a converted model, in all modes; `after` is called with None after an exception, too."""

    def attach(self, model: nn.Module) -> None:
        """Register the hooks on a model."""
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Change the model's arguments."""
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Change the model's output."""
        raise NotImplementedError


def is_entry(module: nn.Module, kind: type[Entry] = Entry) -> bool:
    """Whether a module's own call is one with an entry of this kind."""
    return any(_is(hook, kind) for hook in module._forward_pre_hooks.values())


def _is(hook: Any, kind: type[Entry]) -> bool:
    return isinstance(getattr(hook, "__self__", None), kind)


def detach_entries(model: nn.Module) -> int:
    """Remove every entry from a model and its parts; give their number."""
    removed = 0
    for module in model.modules():
        for hooks, others in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key, hook in list(hooks.items()):
                if _is(hook, Entry):
                    del hooks[key]
                    for other in others:
                        other.pop(key, None)
                    removed += hooks is module._forward_pre_hooks
    return removed
