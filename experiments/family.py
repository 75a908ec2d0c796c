"""All methods at batch 64, against exact BN."""

from trials import Arm, Scale, batch_renorm

TITLE = "The family of methods"
INTRO = "Every method of `leannorm.methods` at batch 64, and the sources that serve best."
SPELLINGS = (
    "gn:32", "renorm:3", "mabn:16", "ghost:16", "adaptive", "grid:1/8", "fs:1/32+vdn:1", "in", "ln",
    "diminishing:1", "l1", "range:16", "bnet:3", "mixture:2", "wageubn:8", "none", "bnet:5", "bnet:7",
)  # fmt: skip


def arms(scale: Scale) -> tuple[Arm, ...]:
    """Give BN and each method; the schedule of batch renorm is as short as the training."""
    short = {"renorm:3": batch_renorm(scale, 64)}
    methods = (Arm(name, short.get(name, name), "BN", batch_size=64) for name in SPELLINGS)
    accumulated = Arm("accumulated:4, batch 16", "accumulated:4", "BN", batch_size=16, accumulate=4)
    return (Arm("BN", "full", batch_size=64), *methods, accumulated)
