"""Where BN stands, how gamma begins, dropout, and what BN allows: the claims of practice, tried."""

from claims import Claim
from trials import Arm, Scale

TITLE = "Placement and initialisation"
INTRO = (
    "BN after the convolution or, in the blocks, after the activation; gamma at 0, 0.1 or 1 at first; dropout beside "
    "BN; and the learning rates that train with BN, with sampled statistics, and without it."
)
VARIANTS = "experiments/variants.py"
RATES = {"cpu": (0.01, 0.1, 1.0, 3.0, 10.0), "full": (0.01, 0.1, 1.0, 3.0, 10.0), "tiny": (0.01, 1e30)}

USUAL = "BN before the activation, gamma 1"
CLAIMS = (
    Claim(
        "BN after the activation costs 1.5 points",
        "BN after the activation",
        USUAL,
        low=-0.025,
        high=-0.005,
        note="Three seeds agree. Its training loss is lower from the first epoch to the last (0.88, else 0.94).",
    ),
    Claim(
        "gamma that begins at 0.1 is better than at 1",
        "gamma 0.1",
        USUAL,
        note="Three seeds agree. Its training loss stays higher to the end (1.07, else 0.94); 12 epochs are few.",
    ),
    Claim("dropout beside BN costs 1.2 points", "dropout 0.2 beside BN", USUAL, low=-0.022, high=-0.002),
    *(
        Claim("BN trains at rates at which nothing else does", f"BN, rate {r}", f"no BN, rate {r}", 0.05)
        for r in (1, 3)
    ),
)


def arms(scale: Scale) -> tuple[Arm, ...]:
    """Give the variants against BN as it stands, and learning rates with BN, without and sampled."""

    def variant(name: str, factory: str, claim: str = "") -> Arm:
        return Arm(name, "full", USUAL, claim, model=f"{VARIANTS}:{scale.model}_{factory}")

    found = [
        Arm(USUAL, "full"),
        variant("BN after the activation", "after_activation", "-1.5 points (claim)"),
        variant("gamma 0.1", "gamma_01", "better (claim)"),
        variant("gamma 0 in the last BN of a block", "gamma_0"),
        variant("dropout 0.2 beside BN", "dropout", "-1.2 points (claim)"),
    ]
    for rate in RATES[scale.name]:
        with_bn = Arm(f"BN, rate {rate:g}", "full", learning_rate=rate)
        found += [
            with_bn,
            Arm(f"no BN, rate {rate:g}", "none", with_bn.name, learning_rate=rate),
            Arm(f"grid 1/8, rate {rate:g}", "grid:1/8", with_bn.name, learning_rate=rate),
        ]
    return tuple(found)
