"""What transforms of models did, refused and measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One thing that a transform did to the module with this qualified name."""

    module: str
    action: str


@dataclass(frozen=True)
class Refusal:
    """One thing that a transform left alone, and why."""

    module: str
    reason: str


@dataclass(frozen=True)
class TransformReport:
    """What a model transform did and what it refused."""

    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class LayerExplanation:
    """Whose code computes a normalization layer.

    ``statistics`` says where they come from, ``operator`` what one call computes, ``served_by`` whose code it is, and
    ``reasons`` in sentences why no other, faster one.
    """

    module: str
    layer: str
    statistics: str
    operator: str
    served_by: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What `leannorm.explain` found, a line for each layer and form of its calls; as text a table."""

    layers: tuple[LayerExplanation, ...] = ()

    def __str__(self) -> str:
        notes = list(dict.fromkeys(reason for layer in self.layers for reason in layer.reasons))
        table = [("module", "layer", "statistics", "computes", "by", "")]
        for layer in self.layers:
            marks = " ".join(f"[{notes.index(reason) + 1}]" for reason in layer.reasons)
            table.append((layer.module, layer.layer, layer.statistics, layer.operator, layer.served_by, marks))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join(lines + [f"[{i}] {note}" for i, note in enumerate(notes, 1)])


@dataclass(frozen=True)
class PrunedLayer:
    """Channels (features of a linear layer) that a layer read and made before and after pruning."""

    layer: str
    inputs_before: int
    inputs_after: int
    outputs_before: int
    outputs_after: int


@dataclass(frozen=True)
class PruningReport:
    """What pruning removed, kept and cost.

    ``channels`` are those of all batch normalizations; ``relative_error`` is that of the outputs on the example
    inputs, ``||pruned - original|| / ||original||``; accuracies are shares in [0, 1], None without data.
    """

    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]
    layers: tuple[PrunedLayer, ...]
    channels_before: int
    channels_after: int
    parameters_before: int
    parameters_after: int
    relative_error: float
    accuracy_before: float | None = None
    accuracy_after: float | None = None


@dataclass(frozen=True)
class LayerSparsity:
    """How much of what an activation behind batch normalization gives is zero.

    ``zeros`` is the share of its elements on the data, ``silent`` counts channels without any other element there. By
    the layer's own parameters ``always_zero`` channels are zero on any data, ``constant`` ones some other number, and
    ``nearly_zero`` ones have beta + k |gamma| <= 0 (None where something is added before the activation).
    """

    layer: str
    activation: str
    channels: int
    zeros: float
    silent: int
    always_zero: int
    constant: int
    nearly_zero: int | None


@dataclass(frozen=True)
class Sparsity:
    """`LayerSparsity` of all layers, in the order of the graph, over so many samples."""

    samples: int
    layers: tuple[LayerSparsity, ...]


@dataclass(frozen=True)
class TunedCall:
    """What a convolution with its batch norm takes, forward and backward: one after the other, and folded."""

    call: str
    apart_seconds: float
    folded_seconds: float


@dataclass(frozen=True)
class CompiledCall:
    """What a batch norm takes under `torch.compile`, forward and backward: as one operator, and decomposed."""

    call: str
    operator_seconds: float
    decomposed_seconds: float


@dataclass(frozen=True)
class TuningPlan:
    """What `leannorm.tune` measured on one machine."""

    calls: tuple[TunedCall, ...] = ()
    compiled: tuple[CompiledCall, ...] = ()
