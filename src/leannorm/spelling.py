"""The command line's spelling of what `leannorm.convert` takes: `parse_target(str(target)) == target`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from leannorm.methods import METHODS, Method
from leannorm.sampling import BatchSampling, FeatureSampling, GridSampling, NaiveSampling
from leannorm.statistics import FullBatch, Statistics, VirtualDataset, WeightedSum

_SOURCES: dict[str, tuple[Callable[..., Statistics], dict[str, dict[str, Any]], tuple[str, ...]]] = {
    # name: class, bare options and the fields they set, options with an integer value
    "ns": (NaiveSampling, {"between_steps": {"between_steps": True}}, ("minimum",)),
    "bs": (BatchSampling, {"between_steps": {"between_steps": True}}, ("minimum",)),
    "fs": (
        FeatureSampling,
        {
            "step": {"position": "step"},
            "fixed": {"position": "fixed"},
            "between_steps": {"between_steps": True},
        },
        ("minimum", "seed"),
    ),
    "grid": (
        GridSampling,
        {
            "step": {"position": "step"},
            "fixed": {"position": "fixed"},
            "between_steps": {"between_steps": True},
        },
        ("minimum", "seed"),
    ),
    "vdn": (
        VirtualDataset,
        {
            **{name: {"distribution": name} for name in ("normal", "uniform", "matched")},
            "between_steps": {"between_steps": True},
        },
        (),
    ),
}

ALLOWED = (
    "full, ns:1/32, bs:1/32, fs:1/32, fs:1/32@step, grid:1/32, grid:1/32@step, vdn:1, vdn:1@uniform, "
    "sums such as fs:1/32+vdn:1 or 0.75*fs:1/32+0.25*vdn:1, and options after @ separated by commas "
    "(fixed, step, between_steps, seed=1, minimum=32; for vdn normal, uniform, matched)"
)


ALLOWED_METHODS = (
    "gn:32, in, ln, renorm:3, mabn:16, ghost:32, accumulated:4, adaptive, diminishing:1, l1, range:16, bnet:3, "
    "mixture:2, wageubn:8, masked, none, and their options after @ separated by commas, such as "
    "renorm:3@d_max=5,start=5000"
)


def parse_target(text: str) -> Statistics | Method:
    """Read a source of statistics or a method from its spelling.

    >>> parse_target("ghost:32"), parse_target("renorm:3@d_max=4"), parse_target("full")
    (GhostBatch(samples=32), BatchRenormalization(r_max=3.0, d_max=4.0, start=5000, r_end=40000, d_end=25000),
    FullBatch())

    Raises:
        ValueError: for anything that is not a spelling; says what is wrong and what is allowed.
    """
    head, at, tail = text.strip().partition("@")
    name, colon, amount = head.partition(":")
    if name not in METHODS:
        return parse_statistics(text)
    fields = dataclasses.fields(METHODS[name])
    given = {field.name: amount for field in fields if colon and not field.kw_only}
    if bool(colon) != bool(given) or (colon and not amount):
        raise _method_error(text, f"{name} takes no {amount!r}")
    options = {field.name for field in fields if field.kw_only}
    for option in tail.split(",") if at else ():
        key, equals, value = option.partition("=")
        if not equals or key not in options:
            raise _method_error(text, f"{name} has no option {option!r}")
        given[key] = value
    kinds = {field.name: field.type for field in fields}
    try:
        return METHODS[name](**{key: _value(value, kinds[key], text) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise _method_error(text, str(error)) from None


def _value(text: str, kind: Any, whole: str) -> float:
    if kind == "float":
        return _number(text, whole)
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _method_error(text: str, reason: str) -> ValueError:
    return ValueError(f"method {text!r}: {reason}; allowed are {ALLOWED_METHODS}")


def parse_statistics(text: str) -> Statistics:
    """Read a statistics source from its spelling.

    >>> parse_statistics("fs:1/32@step+vdn:1")
    WeightedSum(sources=(FeatureSampling(fraction=0.03125, minimum=64, between_steps=False, position='step', seed=0),
    VirtualDataset(samples=1, distribution='normal', between_steps=False)), weights=(0.5, 0.5))

    Raises:
        ValueError: for anything that is not a spelling; says what is wrong and what is allowed.
    """
    terms = [_parse_term(term.strip(), text) for term in text.split("+")]
    sources = tuple(source for _, source in terms)
    if len(terms) == 1:
        if terms[0][0] is not None:
            raise _error(text, "a weight needs a sum of several sources")
        return sources[0]
    weights = tuple(weight for weight, _ in terms if weight is not None)
    if weights and len(weights) != len(terms):
        raise _error(text, "give a weight to every source of the sum, or to none")
    try:
        return WeightedSum(sources, weights)
    except ValueError as error:
        raise _error(text, str(error)) from None


def _parse_term(term: str, text: str) -> tuple[float | None, Statistics]:
    weight, star, spelled = term.rpartition("*")
    head, _, tail = spelled.partition("@")
    name, _, amount = head.partition(":")
    share = _number(weight, text) if star else None
    if head == "full" and not tail:
        return share, FullBatch()
    if name in METHODS:
        raise _error(text, f"{name!r} is a method, which cannot be added to sources (leannorm.parse_target reads it)")
    if name not in _SOURCES:
        raise _error(text, f"{name!r} is not a source, nor a method ({', '.join(METHODS)})")
    cls, flags, integers = _SOURCES[name]
    fields: dict[str, Any] = {}
    for option in filter(None, tail.split(",")):
        key, equals, value = option.partition("=")
        if not equals and option in flags:
            fields |= flags[option]
        elif equals and key in integers and value.isdecimal():
            fields[key] = int(value)
        else:
            raise _error(text, f"{name} has no option {option!r}")
    if cls is VirtualDataset and not amount.isdecimal():
        raise _error(text, f"vdn takes a whole number of samples, got {amount!r}")
    size: Any = int(amount) if cls is VirtualDataset else _number(amount, text)
    try:
        return share, cls(size, **fields)
    except ValueError as error:
        raise _error(text, str(error)) from None


def _number(text: str, whole: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise _error(whole, f"{text!r} is not a number such as 1/32 or 0.1") from None


def _error(text: str, reason: str) -> ValueError:
    return ValueError(f"statistics {text!r}: {reason}; allowed are {ALLOWED}")
