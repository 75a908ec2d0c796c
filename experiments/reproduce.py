"""`make reproduce EXPERIMENT=convergence|micro-batch|family|speed|placement SCALE=cpu|full`.

Trains every arm with two seeds, then as many more as the spread asks for; a killed run goes on where it stopped. Writes
`benchmarks/results/EXPERIMENT-SCALE.json`, `docs/EXPERIMENT-SCALE.md` and its plot after each seed, so that there is a
page of what is finished.
"""

import argparse
import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import convergence
import family
import micro_batch
import placement
import speed
from comparison import seeds_needed
from page import write_page
from trials import ARCHIVE, SCALES, Arm, Scale, Trial, finished, prepare, recorded, trials, write_raw

TABLES: dict[str, ModuleType] = {
    "convergence": convergence,
    "micro-batch": micro_batch,
    "family": family,
    "placement": placement,
}
RESULTS, DOCS = Path("benchmarks/results"), Path("docs")


def wanted_seeds(scale: Scale, arms: tuple[Arm, ...], found: list[Trial]) -> dict[str, int]:
    """Give for each arm the number of seeds that its spread, and the arms that stand against it, ask for."""
    wanted = dict.fromkeys((arm.name for arm in arms), scale.seeds)
    accuracy = {(each.arm, each.seed): each.accuracy for each in found}
    for arm in arms:
        if arm.against is not None:
            seeds = [seed for name, seed in accuracy if name == arm.name and (arm.against, seed) in accuracy]
            differences = [accuracy[arm.name, seed] - accuracy[arm.against, seed] for seed in seeds]
            wanted[arm.name] = seeds_needed(differences, scale.most_seeds)
    for arm in reversed(arms):
        if arm.against is not None:
            wanted[arm.against] = max(wanted[arm.against], wanted[arm.name])
    return wanted


def reproduce(
    name: str,
    scale: Scale,
    *,
    only_finished: bool = False,
    go_on: bool = False,
    results: Path = RESULTS,
    docs: Path = DOCS,
) -> Path:
    """Run an experiment, or take what is finished of it; give its page.

    With ``go_on`` the trials of the results file count as finished, where arm and scale are as they were.
    """
    if name == "speed":
        return speed.run(scale, results, docs)
    experiment = TABLES[name]
    scale = replace(scale, epochs=getattr(experiment, "EPOCHS", {}).get(scale.name, scale.epochs))
    arms = experiment.arms(scale)
    raw = results / f"{name}-{scale.name}.json"
    found = {(each.seed, each.arm): each for each in (recorded(raw, scale, arms) if go_on else [])}

    def keep(more: Iterable[Trial]) -> Path:
        found.update({(each.seed, each.arm): each for each in more})
        order = [(seed, arm.name) for seed in range(scale.most_seeds) for arm in arms]
        ordered = [found[each] for each in order if each in found]
        write_raw(raw, scale, arms, ordered)
        claimed = getattr(experiment, "CLAIMS", ())
        return write_page(docs, name, experiment.TITLE, experiment.INTRO, scale, arms, ordered, claimed)

    def missing(seed: int) -> tuple[Arm, ...]:
        return tuple(arm for arm in arms if (seed, arm.name) not in found)

    if only_finished:
        read = (finished(name, scale, arm, seed) for seed in range(scale.most_seeds) for arm in missing(seed))
        return keep([each for each in read if each is not None])
    for seed in range(scale.seeds):
        keep(list(trials(name, scale, missing(seed), seed)))
    wanted = wanted_seeds(scale, arms, list(found.values()))
    for seed in range(scale.seeds, scale.most_seeds):
        keep(list(trials(name, scale, tuple(arm for arm in missing(seed) if wanted[arm.name] > seed), seed)))
    return keep([])


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Reproduce the paper's tables beside ours.")
    parser.add_argument("experiment", choices=[*TABLES, "speed"])
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--only-finished", action="store_true", help="train nothing, write the page of what is there")
    parser.add_argument("--go-on", action="store_true", help="take the trainings that the results file records")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="CIFAR-10 as class folders, in a tar file")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    scale = SCALES[arguments.scale]
    if arguments.only_finished and arguments.experiment == "speed":
        parser.error("speed has no trainings to take up: leave --only-finished away")
    if not (arguments.only_finished or arguments.experiment == "speed"):
        prepare(scale, arguments.archive)
    print(reproduce(arguments.experiment, scale, only_finished=arguments.only_finished, go_on=arguments.go_on))


if __name__ == "__main__":
    main()
