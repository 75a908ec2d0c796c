"""Which groups of channels go: those that all their readers see constant, then those of the smallest gamma."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leannorm.graph.channel_flow import called
from leannorm.graph.channel_groups import ChannelGroups
from leannorm.records import Change, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from leannorm.graph.capture import Capture

ZERO, CONSTANT, SMALL = KINDS = ("always zero", "constant", "of small gamma")


@dataclass(frozen=True)
class Selection:
    """Groups of channels to remove, by their roots, with the kind of each; and why others stay.

    ``gone`` says for each number of a channel whether it goes. ``shortage`` says by how much a ratio was missed.
    """

    groups: ChannelGroups
    kinds: dict[int, str]
    obstacles: dict[int, str]
    gone: Tensor
    shortage: str | None

    @property
    def is_exact(self) -> bool:
        """Whether outputs stay as they are."""
        return SMALL not in self.kinds.values()

    def changes(self) -> tuple[Change, ...]:
        """What each batch normalization loses."""
        changes = []
        for layer in self.groups.norms:
            roots = self.groups.roots[layer.outputs.members].tolist()
            counts = collections.Counter(self.kinds[root] for root in roots if root in self.kinds)
            if counts:
                kinds = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
                changes.append(Change(layer.layer, f"{counts.total()} of {len(roots)} channels removed: {kinds}"))
        return tuple(changes)

    def refusals(self, *, whole: bool) -> tuple[Refusal, ...]:
        """Why channels stay: with ``whole`` all that cannot go, else those that are constant."""
        refusals = [] if self.shortage is None else [Refusal("", self.shortage)]
        for layer in self.groups.norms:
            roots = self.groups.roots[layer.outputs.members]
            wanted = torch.ones_like(roots, dtype=torch.bool) if whole else ~layer.outputs.constants.isnan()
            stay = [root for root in roots[wanted].tolist() if root in self.obstacles and root not in self.kinds]
            what = "kept" if whole else "kept, though constant"
            for reason, count in collections.Counter(self.obstacles[root] for root in stay).items():
                refusals.append(Refusal(layer.layer, f"{count} of {len(roots)} channels {what}: {reason}"))
        return tuple(refusals)


def select(
    model: nn.Module, capture: Capture, *, ratio: float, min_channels: int, round_to: int, trusted: bool
) -> Selection:
    """Choose channels of a captured model; the arguments are those of `prune` and `ChannelGroups`."""
    groups = ChannelGroups(model, capture, trusted=trusted)
    obstacles, room = _obstacles(groups), _Room(groups, min_channels)
    kinds: dict[int, str] = {}
    for root, is_zero in sorted(_read_constants(groups).items()):
        if root in obstacles:
            continue
        if room.take(root):
            kinds[root] = ZERO if is_zero else CONSTANT
        else:
            obstacles[root] = f"each layer keeps at least {min_channels}"
    shortage, varying = None, {}
    if ratio:
        varying, obstacles = (  # a factor makes act(beta) vary, but not 0
            _obstacles(ChannelGroups(model, capture, small=_everywhere(share), trusted=trusted), at_borders=True)
            for share in (1.0, 0.0)
        )
        shortage = _slim(groups, kinds, obstacles, room, ratio)
    for root in room.give_back(kinds, round_to):
        del kinds[root]
        obstacles[root] = f"each layer keeps a multiple of {round_to}"
    slimmed = [root for root, kind in kinds.items() if kind == SMALL]
    if slimmed:
        shares = torch.full((len(groups.roots),), math.nan, dtype=torch.float64)
        shares[slimmed] = torch.tensor([float(root not in varying) for root in slimmed], dtype=torch.float64)
        small = shares[groups.roots].__getitem__
        groups = ChannelGroups(model, capture, small=small, trusted=trusted)
    gone = torch.isin(groups.roots, torch.tensor(list(kinds), dtype=torch.long))
    return Selection(groups, kinds, obstacles, gone, shortage)


def _everywhere(share: float) -> Callable[[Tensor], Tensor]:
    return lambda members: torch.full(members.shape, share, dtype=torch.float64)


def _obstacles(groups: ChannelGroups, *, at_borders: bool = False) -> dict[int, str]:
    """Why groups stay, by their roots; ``at_borders`` lets a reader's padding lose the constant that it reads."""
    found: dict[int, str] = {}
    for member, reason in groups.kept.items():
        found.setdefault(int(groups.roots[member]), reason)
    for reading in groups.readings:
        if reading.inputs is None or reading.target.groups > 1:
            continue
        here = called(reading.target.node)
        for member, constant in zip(reading.inputs.members.tolist(), reading.inputs.constants.tolist(), strict=True):
            if math.isnan(constant):
                reason = groups.notes.get(member, f"{here} reads more than a constant in them")
            elif constant and reading.bordered and not at_borders:
                reason = f"{here} pads with zeros where its bias would say that they are not 0"
            else:
                continue
            found.setdefault(int(groups.roots[member]), reason)
    return found


def _read_constants(groups: ChannelGroups) -> dict[int, bool]:
    """The groups that somebody reads, and whether all that is read of them is 0."""
    zero: dict[int, bool] = {}
    for reading in groups.readings:
        if reading.inputs is None or reading.target.groups > 1:
            continue
        roots = groups.roots[reading.inputs.members].tolist()
        for root, constant in zip(roots, reading.inputs.constants.tolist(), strict=True):
            zero[root] = zero.get(root, True) and constant == 0
    return zero


def _slim(
    groups: ChannelGroups, kinds: dict[int, str], obstacles: dict[int, str], room: _Room, ratio: float
) -> str | None:
    """Add groups in the order of their largest |gamma|; returns in words by how much the ratio is missed, or None."""
    scores: dict[int, float] = {}
    sizes: collections.Counter[int] = collections.Counter()
    for layer in groups.norms:
        assert layer.gamma is not None
        for root, gamma in zip(groups.roots[layer.outputs.members].tolist(), layer.gamma.tolist(), strict=True):
            scores[root] = max(scores.get(root, 0.0), gamma)
            sizes[root] += 1
    total = sizes.total()
    removed, budget = sum(sizes[root] for root in kinds), math.floor(ratio * total + 1e-9)
    readers = _read_constants(groups)
    for root in sorted(scores, key=lambda root: (scores[root], root)):
        if root in kinds or root in obstacles or root not in readers:
            continue
        if removed + sizes[root] > budget:
            return None
        if room.take(root):
            kinds[root] = SMALL
            removed += sizes[root]
    if removed < budget:
        return f"{removed} of {total} channels can be removed at most, {ratio:.0%} were asked for"
    return None


class _Room:
    """How many channels each layer still has, so that none loses too many.

    Args:
        groups: the channels.
        least: the number that each layer keeps.
    """

    def __init__(self, groups: ChannelGroups, least: int) -> None:
        self.least = least
        self.left: list[int] = []
        self.whole: list[int] = []
        self.counts: dict[int, dict[int, int]] = collections.defaultdict(dict)
        for members in _places(groups):
            for root, count in collections.Counter(groups.roots[members].tolist()).items():
                self.counts[root][len(self.left)] = count
            self.left.append(len(members))
        self.whole = self.left.copy()

    def take(self, root: int) -> bool:
        """Remove a group, if every layer keeps enough."""
        counts = self.counts[root]
        if any(self.left[place] - count < self.least for place, count in counts.items()):
            return False
        for place, count in counts.items():
            self.left[place] -= count
        return True

    def give_back(self, taken: Iterable[int], multiple: int) -> list[int]:
        """Keep groups after all, those taken last first, until every layer keeps a multiple of channels or all."""
        kept: dict[int, None] = {}
        taken_at: dict[int, list[int]] = collections.defaultdict(list)
        for root in taken:
            for place in self.counts[root]:
                taken_at[place].append(root)
        uneven = sorted(taken_at, reverse=True)
        while uneven:
            place = uneven.pop()
            while self.left[place] % multiple and self.left[place] < self.whole[place]:
                root = taken_at[place].pop()
                if root in kept:
                    continue
                kept[root] = None
                for other, count in self.counts[root].items():
                    self.left[other] += count
                    uneven.append(other)
        return list(kept)


def _places(groups: ChannelGroups) -> Iterable[Tensor]:
    """The numbers of the channels of everything that must keep some."""
    for reading in groups.readings:
        yield reading.outputs.members
        if reading.inputs is not None:
            yield reading.inputs.members
    for layer in groups.layers:
        yield layer.outputs.members
