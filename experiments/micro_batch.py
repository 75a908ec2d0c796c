"""Tiny batches at equal numbers of images seen: exact BN against what is made for them.

The learning rate goes down in proportion with the batch; accumulated moments take steps of 32 images.
"""

from claims import Claim
from trials import Arm, Scale, batch_renorm

TITLE = "Micro-batches"
INTRO = "Batches of 1 to 32 images, all with the same number of epochs, against exact BN at the same batch."
BATCHES = {"cpu": (2, 4, 32), "full": (1, 2, 4, 8, 32), "tiny": (128, 512)}
METHODS = {
    "GN": "gn:32",
    "batch renorm": "",  # with a schedule as short as the training
    "MABN": "mabn:16",
    "VDN 1": "vdn:1",
    "FS 1/32 + VDN 1": "fs:1/32+vdn:1",
    "ghost": "ghost:16",
}
PAPER = {"MABN": "76.33 (BN 64.78), ImageNet at 2", "batch renorm": "69.71 (BN 64.78), ImageNet at 2"}
EPOCHS = {"cpu": 4}  # an epoch at batch 2 takes four times as long as one at 128
STEP = 32  # images of a step with accumulated moments

CLAIMS = (
    *(
        Claim(
            "virtual samples are far above BN at tiny batches", f"{method}, batch {batch}", f"BN, batch {batch}", 0.05
        )
        for batch in (2, 4)
        for method in ("VDN 1", "FS 1/32 + VDN 1")
    ),
    *(
        Claim("the best method is 10 points above BN at 2", f"{method}, batch 2", "BN, batch 2", 0.10)
        for method in ("MABN", "VDN 1")
    ),
    *(
        Claim("the best method at 2 is within 2 points of BN at 64", f"{method}, batch 2", "BN, batch 64", -0.02)
        for method in ("MABN", "VDN 1")
    ),
)


def arms(scale: Scale) -> tuple[Arm, ...]:
    """Give BN at 64, then for each batch BN and all methods that it leaves something to do."""
    found = [Arm("BN, batch 64", "full", batch_size=64)]
    for batch in BATCHES[scale.name]:
        bn = f"BN, batch {batch}"
        found.append(Arm(bn, "full", "BN, batch 64", batch_size=batch))
        for name, spelling in METHODS.items():
            if name == "ghost" and batch <= 16:
                continue  # one chunk: BN
            if name == "batch renorm":
                spelling = batch_renorm(scale, batch)
            paper = PAPER.get(name, "") if batch == 2 else ""
            found.append(Arm(f"{name}, batch {batch}", spelling, bn, paper, batch_size=batch))
        steps = STEP // batch
        if steps > 1:
            options = {"batch_size": batch, "accumulate": steps}
            plain = Arm(f"BN, batch {batch} x {steps}", "full", bn, **options)
            found += [
                plain,
                Arm(f"accumulated, batch {batch} x {steps}", f"accumulated:{steps}", plain.name, **options),
            ]
    return tuple(found)
