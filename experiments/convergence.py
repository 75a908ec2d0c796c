"""The paper's convergence figure: exact BN against every source, the same data order for all.

The paper's numbers: final validation accuracy read off the convergence figure of arXiv 1810.10962
(32x32 images, 130 epochs, batch 128).
"""

from claims import Claim
from trials import Arm, Scale

TITLE = "Convergence with sampled statistics"
INTRO = "Exact BN against naive, batch, feature, grid and virtual sampling, each at several fractions."
ON_CURVE = "on BN's curve, 0.93"

FIRST = (
    Arm("BN", "full", paper="0.93"),
    Arm("FS 1/32 fixed", "fs:1/32", "BN", ON_CURVE),
    Arm("grid 1/32 fixed", "grid:1/32", "BN"),
    Arm("grid 1/8 fixed", "grid:1/8", "BN"),
    Arm("BS 4/128", "bs:1/32", "BN", ON_CURVE),
    Arm("NS 4/128", "ns:1/32", "BN", "below BS"),
    Arm("VDN 1", "vdn:1", "BN", "0.92"),
    Arm("FS 1/32 + VDN 1", "fs:1/32+vdn:1", "BN"),
    Arm("FS 1/4 fixed", "fs:1/4", "BN", ON_CURVE),
    Arm("FS 1/16 fixed", "fs:1/16", "BN", ON_CURVE),
    Arm("FS 1/64 fixed", "fs:1/64", "BN", ON_CURVE),
    Arm("FS 1/32 redrawn", "fs:1/32@step", "BN"),
    Arm("grid 1/32 redrawn", "grid:1/32@step", "BN"),
    Arm("BS 4/128 + VDN 1", "bs:1/32+vdn:1", "BN"),
)
REST = (
    *(Arm(f"NS {k}/128", f"ns:{k}/128", "BN", p) for k, p in ((8, ""), (2, "below BS"), (1, "0.89"))),
    *(Arm(f"BS {k}/128", f"bs:{k}/128", "BN", p) for k, p in ((8, ON_CURVE), (2, "just under"), (1, "0.91"))),
    *(Arm(f"FS 1/{k} redrawn", f"fs:1/{k}@step", "BN") for k in (4, 16, 64)),
    Arm("grid 1/64 fixed", "grid:1/64", "BN"),
    *(Arm(f"grid 1/{k} redrawn", f"grid:1/{k}@step", "BN") for k in (8, 64)),
    Arm("VDN 4", "vdn:4", "BN", "0.92"),
)

CLAIMS = (
    *(Claim("FS is on BN's curve", f"FS 1/{k} fixed", "BN", low=-0.005, high=0.005) for k in (4, 16, 32)),
    Claim(
        "FS is on BN's curve",
        "FS 1/64 fixed",
        "BN",
        low=-0.005,
        high=0.005,
        note="Four seeds agree, by a small margin. Of the fixed patches it is the smallest, and its mean the noisiest "
        "from step to step (0.05 sigma, [why](default-source.md)).",
    ),
    Claim("BS is above NS at the same small ratio", "BS 4/128", "NS 4/128"),
    Claim(
        "VDN is close below BN",
        "VDN 1",
        "BN",
        low=-0.02,
        high=0.0,
        note="Four seeds agree. Its training loss ends higher too (1.11, BN 0.94), so the gap is made in training, "
        "not by the inference statistics. It opens after the seventh of 12 epochs; the paper trains for 130.",
    ),
    *(
        Claim("FS + VDN is the best of the sampled ones", "FS 1/32 + VDN 1", other)
        for other in ("FS 1/32 fixed", "VDN 1", "BS 4/128", "BS 4/128 + VDN 1")
    ),
    *(
        Claim("the best sampled source is within half a point of BN", f"grid 1/{k} fixed", "BN", low=-0.005)
        for k in (8, 32)
    ),
)


def arms(scale: Scale) -> tuple[Arm, ...]:
    """Give the arms: those chosen first, and at the full scale all."""
    return FIRST + REST if scale.name == "full" else FIRST
