"""Activations that a normalization layer can apply itself, as frozen values that carry their parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

KINDS = {
    "relu": (),
    "clamp": ("low", "high"),
    "leaky_relu": ("negative_slope",),
    "silu": (),
    "hardswish": (),
    "gelu": (),
    "gelu_tanh": (),
}


@dataclass(frozen=True)
class Activation:
    """An element-wise activation: its kind and the parameters that its formula takes.

    ============  ==============================================  ==============
    kind          formula                                         parameters
    ============  ==============================================  ==============
    relu          max(z, 0)
    clamp         min(max(z, low), high); relu6 is clamp(0, 6)    (low, high)
    leaky_relu    z if z > 0 else negative_slope z                (negative_slope,)
    silu          z / (1 + exp(-z))
    hardswish     z min(max(z + 3, 0), 6) / 6
    gelu          z Phi(z), Phi the normal distribution function
    gelu_tanh     gelu's approximation by tanh
    ============  ==============================================  ==============

    Raises:
        ValueError: for an unknown kind, a wrong number of parameters, ``low >= high``, or a slope that is not positive
            (the gradient is taken from the output's sign).
    """

    kind: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown activation {self.kind!r}; choose one of {', '.join([*KINDS, 'relu6'])}")
        names = KINDS[self.kind]
        if len(self.parameters) != len(names):
            raise ValueError(f"activation {self.kind!r} takes the parameters {names}, got {self.parameters}")
        object.__setattr__(self, "parameters", tuple(float(p) for p in self.parameters))
        if self.kind == "clamp" and not self.parameters[0] < self.parameters[1]:
            raise ValueError(f"clamp needs low < high, got {self.parameters}")
        if self.kind == "leaky_relu" and not self.parameters[0] > 0:
            raise ValueError(f"leaky_relu needs a positive negative_slope, got {self.parameters[0]}; 0 is 'relu'")

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.parameters))})" if self.parameters else self.kind


_NAMED = {
    "relu": Activation("relu"),
    "relu6": Activation("clamp", (0.0, 6.0)),
    "leaky_relu": Activation("leaky_relu", (0.01,)),
    "silu": Activation("silu"),
    "hardswish": Activation("hardswish"),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
}


def as_activation(value: str | Activation | None) -> Activation | None:
    """Give the activation that a name with its default parameters, a value, or None (identity) stands for.

    >>> as_activation("relu6")
    Activation(kind='clamp', parameters=(0.0, 6.0))

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if value is None or isinstance(value, Activation):
        return value
    if not isinstance(value, str):
        raise TypeError(f"activation must be a name, a leannorm.Activation or None, got {value!r}")
    if value not in _NAMED:
        raise ValueError(f"unknown activation {value!r}; choose one of {', '.join(_NAMED)}")
    return _NAMED[value]


def activation_of(module: nn.Module) -> Activation | None:
    """Give the activation that a torch module computes, or None where it is not one of ours."""
    if type(module).__module__ != "torch.nn.modules.activation":
        return None  # a subclass may compute something else
    match module:
        case nn.ReLU6():
            return _NAMED["relu6"]
        case nn.ReLU():
            return _NAMED["relu"]
        case nn.Hardtanh():
            return Activation("clamp", (module.min_val, module.max_val))
        case nn.LeakyReLU() if module.negative_slope > 0:
            return Activation("leaky_relu", (module.negative_slope,))
        case nn.SiLU():
            return _NAMED["silu"]
        case nn.Hardswish():
            return _NAMED["hardswish"]
        case nn.GELU():
            return _NAMED["gelu_tanh" if module.approximate == "tanh" else "gelu"]
        case _:
            return None
