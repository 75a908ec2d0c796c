"""Who loses a channel with whom: groups of channels that a graph ties together, and which of them are constant.

Each convolution and linear layer makes channels of its own. Batch normalization, activations, pooling and reshapes hand
them on, an addition or product makes those that meet one group, a grouped convolution ties the inputs and outputs of
each of its groups. What is not known here ties nothing: it keeps the channels that it reads, with a reason.

Along with its channels each value carries the numbers that they are where they are constant: batch normalization with
gamma = 0 makes beta, an activation act(beta). What a layer reads of such a channel its bias can say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from leannorm.graph import affine, batch_norm
from leannorm.graph.capture import arguments, aten_name, may_alias, value_of, writes_to
from leannorm.graph.channel_flow import Channels, Meeting, bordered, called, concatenated, moved, pointwise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.fx import Node

    from leannorm.graph.affine import Affine
    from leannorm.graph.batch_norm import BatchNorm
    from leannorm.graph.capture import Capture

_NORM_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@dataclass(frozen=True)
class Reading:
    """A call of a convolution or linear layer, the channels that it reads (None: not followed), and those it makes.

    ``bordered`` says that a constant other than 0 would not be one at the borders of its result; ``layer`` is the
    qualified name of the module that holds its weight.
    """

    layer: str
    target: Affine
    inputs: Channels | None
    outputs: Channels
    bordered: bool


@dataclass(frozen=True)
class PerChannel:
    """A layer that holds numbers for each channel: batch normalization, with |gamma|, or PReLU, without."""

    layer: str
    outputs: Channels
    gamma: Tensor | None


class ChannelGroups:
    """The channels of a captured graph, numbered, and tied to groups.

    Args:
        model: the module that was captured; its layers' classes are looked at.
        capture: the graph.
        small: for the numbers of channels of a batch normalization the share of beta that is left of it where its
            gamma is to be seen as 0, NaN where it is as it is.
        trusted: take sizes in reshapes for computed from the shape, not written in the model's code.

    ``readings`` and ``layers`` hold what would be cut, ``values`` the channels of each followed value, ``roots`` the
    group of each number. ``kept`` says of numbers why they must stay, ``notes`` why they are not constant.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        *,
        small: Callable[[Tensor], Tensor] | None = None,
        trusted: bool = False,
    ) -> None:
        self.readings: list[Reading] = []
        self.layers: list[PerChannel] = []
        self.kept: dict[int, str] = {}
        self.notes: dict[int, str] = {}
        self.values: dict[Node, Channels] = {}
        self._model, self._capture, self._small, self._trusted = model, capture, small, trusted
        self._parents: list[int] = []
        self._memory: dict[Node, Node] = {}
        self._written: dict[Node, Node] = {}
        self._owners = _owners(model)
        norms = {norm.node: norm for norm in batch_norm.find(capture.graph) if aten_name(norm.node)}
        for node in capture.graph.nodes:
            if node.op == "placeholder":
                continue
            if node in norms:
                self._normalize(norms[node])
            elif (target := affine.read(node)) is not None:
                self._apply(target)
            else:
                self._flow(node)
            self._remember(node)
        self.roots = torch.tensor([self._root(member) for member in range(len(self._parents))], dtype=torch.long)

    @property
    def norms(self) -> list[PerChannel]:
        """The batch normalizations, in the order of the graph."""
        return [layer for layer in self.layers if layer.gamma is not None]

    def _root(self, member: int) -> int:
        while self._parents[member] != member:
            self._parents[member] = self._parents[self._parents[member]]
            member = self._parents[member]
        return member

    def _tie(self, ones: Tensor, others: Tensor) -> None:
        for one, other in zip(ones.tolist(), others.tolist(), strict=True):
            one, other = self._root(one), self._root(other)
            self._parents[max(one, other)] = min(one, other)

    def _keep(self, channels: Channels | None, reason: str) -> None:
        for member in [] if channels is None else channels.members.tolist():
            self.kept.setdefault(member, reason)

    def _note(self, members: Tensor, reason: str) -> None:
        for member in members.tolist():
            self.notes.setdefault(member, reason)

    def _new(self, dim: int, count: int, reason: str | None = None) -> Channels:
        begin = len(self._parents)
        self._parents.extend(range(begin, begin + count))
        made = Channels(dim, torch.arange(begin, begin + count), torch.full((count,), math.nan, dtype=torch.float64))
        if reason is not None:
            self._keep(made, reason)
        return made

    def _read(self, node: Node, reader: Node) -> Channels | None:
        """Channels of a value; they are kept where somebody wrote into its memory after it was made."""
        channels = self.values.get(node)
        writer = self._written.get(self._memory.get(node, node))
        if channels is not None and writer is not None and node < writer:
            self._keep(channels, f"{called(writer)} writes over them before {called(reader)} reads them")
            return Channels(channels.dim, channels.members, torch.full_like(channels.constants, math.nan))
        return channels

    def _remember(self, node: Node) -> None:
        first = node.args[0] if node.args else None
        if isinstance(first, torch.fx.Node) and may_alias(node):
            self._memory[node] = self._memory.get(first, first)
        for source in node.all_input_nodes:
            if writes_to(node, source):
                self._written[self._memory.get(source, source)] = node

    def _flow(self, node: Node) -> None:
        sources = {source: self._read(source, node) for source in node.all_input_nodes}
        followed = {source: channels for source, channels in sources.items() if channels is not None}
        if not followed or aten_name(node) == "_assert_tensor_metadata":  # of a dtype, which stays
            return
        if node.op == "output":
            found: Channels | Meeting | str = "they are an output of the model"
        elif aten_name(node) == "prelu":
            found = self._prelu(node, followed)
        elif aten_name(node) == "cat":
            found = concatenated(node, {s: c or self._of_another(s, node) for s, c in sources.items()})
        else:
            found = pointwise(node, followed) or bordered(node, followed) or moved(node, followed, self._trusted)
        if isinstance(found, str):
            for channels in followed.values():
                self._keep(channels, found)
            return
        if isinstance(found, Meeting):
            for one, other in found.ties:
                self._tie(one, other)
            self._note(found.lost, f"{called(node)} joins them with others that are not constant")
            found = found.result
        self.values[node] = found

    def _of_another(self, part: Node, node: Node) -> Channels | None:
        """Channels, all kept, for a part of a concatenation that is not followed."""
        value, dim = value_of(part), arguments(node)["dim"]
        if value is None or not isinstance(value.shape[dim], int):
            return None
        return self._new(dim % value.ndim, value.shape[dim], f"they come from {called(part)}")

    def _apply(self, target: Affine) -> None:
        node, value, held = target.node, value_of(target.node), value_of(target.weight)
        source = self._read(target.input, node)
        if value is None or held is None:
            self._keep(source, f"{called(node)} gives no tensor")
            return
        dim = value.ndim - held.ndim + 1
        reason = self._affine_refusal(target)
        made = self._new(dim, value.shape[dim], reason)
        if reason is not None:
            self._keep(source, reason)
        elif source is not None and not target.is_channel(self._capture, target.input, source.dim):
            self._keep(source, f"{called(node)} takes its inputs from another dimension")
            source = None
        if reason is None:
            weight, bias = target.values(self._capture)
            border = _has_border(target, tuple(weight.shape[2:]))
            made = Channels(dim, made.members, _constants(target, weight, bias, source, border))
            if target.groups > 1 and source is None:
                self._keep(made, f"{called(node)} has groups, and reads channels that are not followed")
            elif target.groups > 1 and source is not None:
                inputs, outputs = (c.members.view(target.groups, -1) for c in (source, made))
                for members in (*inputs.T, *outputs.T):
                    self._tie(inputs[:, 0], members)
                known = ~source.constants.view(target.groups, -1).isnan().any(1)
                lost = known[:, None] & made.constants.view(target.groups, -1).isnan()
                self._note(outputs[lost], f"{called(node)} pads them with zeros, which they are not")
            self.readings.append(Reading(self._layer(target.weight), target, source, made, border))
        self.values[node] = made

    def _layer(self, held: Node) -> str:
        return self._capture.target(held).rpartition(".")[0]

    def _affine_refusal(self, target: Affine) -> str | None:
        held = {"weight": target.weight, "bias": target.bias}
        kinds = _ConvTransposeNd if target.inputs_first else (_ConvNd, nn.Linear)
        return self._refusal(target.node, held, kinds, {"weight", "bias"}, through=target.transposed)

    def _normalize(self, norm: BatchNorm) -> None:
        source, value = self._read(norm.input, norm.node), value_of(norm.node)
        if value is None or not isinstance(value.shape[1], int):
            self._keep(source, f"{called(norm.node)} does not give one tensor of a known size")
            return
        held = {name: getattr(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
        reason = self._refusal(norm.node, held, _BatchNorm, _NORM_TENSORS)
        if source is not None and source.dim != 1:
            reason = reason or f"{called(norm.node)} has its channels in another dimension"
        if source is None or reason is not None:
            self._keep(source, reason or "")
            source = self._new(1, value.shape[1], reason or f"they come from {called(norm.input)}")
        constants = {name: None if node is None else self._capture.constant(node) for name, node in held.items()}
        weight, bias = constants["weight"], constants["bias"]
        gamma = torch.ones(value.shape[1], dtype=torch.float64) if weight is None else weight.detach().double().cpu()
        outputs = torch.full_like(gamma, math.nan)
        if not norm.training and norm.running_mean is not None and constants["running_mean"] is not None:
            scale, shift = (v.cpu() for v in batch_norm.scale_and_shift(**constants, eps=norm.eps))  # pyright: ignore[reportArgumentType]
            outputs = scale * source.constants + shift
        beta = torch.zeros_like(gamma) if bias is None else bias.detach().double().cpu()
        outputs = torch.where(gamma == 0, beta, outputs)
        if self._small is not None:
            share = self._small(source.members)
            outputs = torch.where(share.isnan(), outputs, share * beta)
        made = Channels(1, source.members, outputs)
        layer = next((self._layer(node) for node in held.values() if node is not None and reason is None), norm.module)
        self.layers.append(PerChannel(layer, made, gamma.abs()))
        self.values[norm.node] = made

    def _prelu(self, node: Node, followed: Mapping[Node, Channels]) -> Channels | str:
        weight = arguments(node)["weight"]
        if arguments(node)["self"] not in followed or len(followed) > 1:
            return f"{called(node)} computes with a weight that is no parameter"
        if reason := self._refusal(node, {"weight": weight}, nn.PReLU, {"weight"}):
            return reason
        (source,), slope = followed.values(), self._capture.constant(weight)
        assert slope is not None
        x = source.constants
        made = Channels(source.dim, source.members, torch.where(x >= 0, x, slope.detach().double().cpu() * x))
        if slope.numel() > 1:
            self.layers.append(PerChannel(self._layer(weight), made, None))
        return made

    def _refusal(
        self, node: Node, held: dict[str, Node | None], kinds: Any, known: set[str], through: Node | None = None
    ) -> str | None:
        """Why the tensors that a call reads, its weight perhaps ``through`` another node, cannot be cut; or None."""
        here, found = called(node), {field: source for field, source in held.items() if source is not None}
        for field, source in found.items():
            if self._capture.constant(source) is None:
                return f"the {field} of {here} is computed, given or written to"
            readers = {*source.users, *(through.users if through is not None and through in source.users else ())}
            if others := sorted(called(reader) for reader in readers - {node, through}):
                return f"{here} shares its {field} with {', '.join(others)}"
            path, _, name = self._capture.target(source).rpartition(".")
            owner = self._model.get_submodule(path)
            if name != field or not isinstance(owner, kinds):
                return f"the {field} of {here} belongs to a {type(owner).__name__}, whose sizes only its own code knows"
            if more := {*owner._parameters, *owner._buffers} - known:
                return f"{path}, a {type(owner).__name__}, holds more than its class: {', '.join(sorted(more))}"
            if len(self._owners[id(owner._parameters.get(name, owner._buffers.get(name)))]) > 1:
                return f"the {field} of {here} is held by another module too"
        if len({self._capture.target(source).rpartition(".")[0] for source in found.values()}) != 1:
            return f"what {here} computes with is not of one layer"
        return None


def _owners(model: nn.Module) -> dict[int, set[int]]:
    """The modules that hold a parameter or buffer, all by their identities."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            owners.setdefault(id(tensor), set()).add(id(module))
    return owners


def _has_border(target: Affine, kernel: tuple[int, ...]) -> bool:
    """Whether some results of a convolution read fewer elements of a channel than others."""
    bound = arguments(target.node)
    padding = bound.get("padding", 0)
    if target.inputs_first:
        return math.prod(kernel) > 1 or any(step != 1 for step in _each(bound["stride"])) or any(_each(padding))
    return padding != "valid" and (isinstance(padding, str) or any(_each(padding)))


def _each(sizes: Any) -> list[int]:
    return list(sizes) if isinstance(sizes, list | tuple) else [sizes]


def _constants(target: Affine, weight: Tensor, bias: Tensor | None, source: Channels | None, border: bool) -> Tensor:
    """What the channels that a layer makes always are: its bias, where nothing unknown has a weight other than 0.

    Only layers with groups look at what they read: what the others make belongs to another group of channels.
    """
    heavy = channel_sums(target, weight != 0)
    offsets = torch.zeros(len(heavy), dtype=torch.float64) if bias is None else bias.detach().double().cpu()
    if target.groups == 1 or source is None:
        return torch.where(heavy.any(1), math.nan, offsets)
    unknown = source.constants.isnan() | ((source.constants != 0) & border)
    known = torch.where(unknown, 0.0, source.constants)
    repeats = len(heavy) // target.groups
    unknown, known = (v.view(target.groups, -1).repeat_interleave(repeats, 0) for v in (unknown, known))
    offsets = offsets + (channel_sums(target, weight) * known).sum(1)
    return torch.where((unknown & (heavy > 0)).any(1), math.nan, offsets)


def channel_sums(target: Affine, weight: Tensor) -> Tensor:
    """Weights summed over the kernel, ``(outputs, inputs / groups)`` in float64: what a constant is multiplied by."""
    sums = weight.detach().flatten(2).sum(2, dtype=torch.float64) if weight.ndim > 2 else weight.detach().double()
    if target.inputs_first:
        inputs, outputs = len(sums) // target.groups, sums.shape[1]
        sums = sums.view(target.groups, inputs, outputs).transpose(1, 2).reshape(-1, inputs)
    return sums.cpu()
