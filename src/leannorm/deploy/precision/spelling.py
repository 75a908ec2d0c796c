"""How the command line spells which files to ship."""

from __future__ import annotations

from leannorm.deploy.precision.formats import LADDER


def parse_precision(text: str) -> tuple[str, tuple[str, ...] | None]:
    """Read ``fp32``, ``int8``, ``plan`` or ``plan:int8,fp16``.

    Returns:
        The first word, and the formats that a plan may use; None where it has none or may use all that are native.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_precision("plan:fp16,int8")
        ('plan', ('fp16', 'int8'))
    """
    word, colon, listed = text.partition(":")
    types = tuple(kind.strip() for kind in listed.split(",")) if colon else None
    if word not in ("fp32", "int8", "plan") or (colon and (word != "plan" or not set(types or ()) <= set(LADDER))):
        raise ValueError(
            f"precision must be fp32, int8, plan, or plan: with formats of {', '.join(LADDER)} such as plan:int8,fp16; "
            f"got {text!r}"
        )
    return word, types
