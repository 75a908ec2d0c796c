"""Models by their command-line spelling."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from leannorm.train import resnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

BUILT_IN: dict[str, Callable[..., nn.Module]] = {"resnet8": resnet.resnet8, "resnet20": resnet.resnet20}
SPELLINGS = f"{', '.join(BUILT_IN)}, torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory"

# A library object takes its schemas back when it is collected.
_schemas: list[torch.library.Library] = []


def build(spec: str, *, classes: int, channels: int) -> nn.Module:
    """Build a model, with freshly initialised weights, from its spelling.

    A factory of the user's own is called with ``num_classes=`` and ``in_channels=`` where its signature takes them.
    A path to a file is read relative to the working directory.

    Args:
        spec: `resnet8`, `resnet20`, `torchvision:NAME`, `timm:NAME`, `package.module:factory` or
            `path/to/file.py:factory`.
        classes: number of classes, the width of the logits.
        channels: channels of the input images.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: for a spelling or name that is not known, a factory that cannot be called so or that returns
            something else than a module, or a model that cannot take this number of channels.
        FileNotFoundError: if the file with the factory does not exist.
        ImportError: if timm is asked for and is not installed.
    """
    source, colon, name = spec.rpartition(":")
    if not colon:
        if spec not in BUILT_IN:
            raise ValueError(f"unknown model {spec!r}{_close(spec, BUILT_IN)}; expected {SPELLINGS}")
        return BUILT_IN[spec](num_classes=classes, in_channels=channels)
    if not source or not name:
        raise ValueError(f"unknown model {spec!r}; expected {SPELLINGS}")
    if source == "torchvision":
        return _torchvision_model(name, classes, channels)
    if source == "timm":
        return _timm_model(name, classes, channels)
    return _call(_factory(source, name), spec, classes, channels)


def require(name: str, *, extra: str) -> None:
    """Raise an ImportError that names the extra to install if the package ``name`` is not there."""
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{name} is not installed: pip install 'leannorm[{extra}]'")


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators cannot load beside this torch.

    Returns:
        The module. Its models, transforms and data sets work; where the compiled operators are missing,
        `torchvision.ops.nms` and its siblings raise torchvision's own error.

    Raises:
        ImportError: if torchvision is not installed.
    """
    require("torchvision", extra="train")
    define_missing_operators()
    return importlib.import_module("torchvision")


def define_missing_operators() -> None:
    """Define the operators that `import torchvision` needs, where its compiled ones cannot load.

    torchvision registers fake kernels for `nms` and `qnms` at import, whether or not its library has defined them, and
    fails if it has not: a wheel built for another device beside a CPU torch. This loads the library just as torchvision
    does, and does nothing more where that works.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or hasattr(torch.ops.torchvision, "nms"):
        return
    folder = spec.submodule_search_locations[0]
    operators = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if operators is not None and operators.origin is not None:
        with contextlib.suppress(OSError):
            torch.ops.load_library(operators.origin)
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)


def _torchvision_model(name: str, classes: int, channels: int) -> nn.Module:
    models = importlib.import_module(f"{import_torchvision().__name__}.models")
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"unknown model 'torchvision:{name}'{_close(name, known)}; expected one of {_few(known)}")
    if channels != 3:
        raise ValueError(
            f"torchvision:{name} takes images of 3 channels, got {channels}: use {', '.join(BUILT_IN)}, timm:NAME or "
            "a factory of your own, which take any number"
        )
    # Their auxiliary classifiers would return several outputs in training.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **options)


def _timm_model(name: str, classes: int, channels: int) -> nn.Module:
    require("timm", extra="timm")
    define_missing_operators()
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        known = timm.list_models()
        raise ValueError(f"unknown model 'timm:{name}'{_close(name, known)}; expected one of {_few(known)}")
    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)


def _factory(source: str, name: str) -> Callable[..., object]:
    module = _run_file(Path(source)) if source.endswith(".py") else _import(source, name)
    factory = getattr(module, name, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{source} has no factory {name!r}{_close(name, public)}")
    return factory


def _import(source: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(
            f"unknown model '{source}:{name}': there is no module {error.name!r} to import; expected {SPELLINGS}"
        ) from None


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} to take the model's factory from (working directory: {Path.cwd()})")
    name = f"leannorm_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _call(factory: Callable[..., object], spec: str, classes: int, channels: int) -> nn.Module:
    offered = {"num_classes": classes, "in_channels": channels}
    parameters = inspect.signature(factory).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in required if name not in offered or name not in named]
    if missing:
        raise ValueError(
            f"{spec} requires {', '.join(missing)}, but a factory is called with num_classes= and in_channels= only: "
            "give the others defaults"
        )
    model = factory(**{name: value for name, value in offered.items() if takes_any or name in named})
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _close(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + f", ... ({len(names)} in all)"
