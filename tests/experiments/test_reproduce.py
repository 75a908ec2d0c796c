"""The machinery of `make reproduce`: intervals, seeds, resuming, pages; with trainings of one epoch."""

import dataclasses
import json
import math
import shutil
import tarfile
from pathlib import Path

import claims
import comparison
import page
import pytest
import reproduce
import runs
import speed
import trials
from scipy import stats
from trials import Arm, Scale, Trial

import leannorm
from leannorm.train.models import build

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = dataclasses.replace(trials.SCALES["tiny"], most_seeds=2)
ARMS = (
    Arm("BN", "full", paper="0.93"),
    Arm("grid", "grid:1/4", "BN", "near"),
    Arm("wild", "none", "BN", learning_rate=1e30),
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.TABLES["family"], "arms", lambda scale: ARMS)
    return lambda **options: reproduce.reproduce(
        "family", TINY, results=tmp_path / "results", docs=tmp_path / "docs", **options
    )


def test_finished_trainings_are_not_run_again_and_stopped_ones_go_on(small, monkeypatch, tmp_path):
    trained, calls = runs.train, []

    def stop_at_the_third(*args, **options):
        calls.append(options)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trained(*args, **options)

    monkeypatch.setattr(runs, "train", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        small()
    only_finished = small(only_finished=True)
    assert "| BN | `full` |" in only_finished.read_text()
    assert "| wild | `none` | not run |" in only_finished.read_text()
    assert len(calls) == 3, "nothing is trained for the page of what is finished"
    path = small()
    assert len(calls) == 3 + 4  # the third again, and the second seed
    text, raw = path.read_text(), json.loads((tmp_path / "results" / "family-tiny.json").read_text())
    assert [(each["arm"], each["seed"]) for each in raw["trials"]] == [(a.name, s) for s in (0, 1) for a in ARMS]
    small()
    assert len(calls) == 7, "nothing was left to run"
    assert path.read_text() == text
    assert "| wild | `none` | 0.00% (2 diverged)" in text
    assert "| BN | `full` |" in text
    assert "| 0.93 |" in text
    assert raw["trials"][2]["run"] is None
    assert "torch" in dict(raw["trials"][0]["run"]["environment"]["versions"])
    svg = (tmp_path / "docs" / "family-tiny.svg").read_text()
    assert ">grid<" in svg
    assert {call["seed"] for call in calls} == {0, 1}


def test_recorded_trials_go_on_where_they_were_not_trained(small, monkeypatch, tmp_path):
    text = small().read_text()
    raw = tmp_path / "results" / "family-tiny.json"
    plain = json.loads(raw.read_text())
    shutil.rmtree(tmp_path / "runs")
    raw.write_text(json.dumps(plain | {"trials": plain["trials"][:-2]}))  # BN's second seed is the last that is left
    trained, calls = runs.train, []
    monkeypatch.setattr(runs, "train", lambda *args, **options: calls.append(options) or trained(*args, **options))
    assert "(1 diverged)" in small(go_on=True, only_finished=True).read_text()
    assert not calls
    page = small(go_on=True)
    assert [(call["statistics"], call["seed"]) for call in calls] == [("grid:1/4", 1), ("none", 1)]
    assert json.loads(raw.read_text())["trials"][:4] == plain["trials"][:4]
    assert len(page.read_text().splitlines()) == len(text.splitlines())
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(reproduce.TABLES["family"], "arms", lambda scale: (ARMS[0], Arm("grid", "grid:1/8", "BN")))
    small(go_on=True)
    assert [call["statistics"] for call in calls[2:]] == ["grid:1/8"] * 2, "the arm of that name is another one now"
    longer = dataclasses.replace(TINY, epochs=2)
    assert trials.recorded(raw, longer, ARMS) == trials.recorded(tmp_path / "none.json", TINY, ARMS) == []


def test_a_finished_training_of_other_arguments_is_not_taken(monkeypatch, tmp_path):
    options = {"statistics": "grid:0.25", "seed": 0, "epochs": 1, "batch_size": 512, "out": tmp_path / "run"}
    first = runs.trained("resnet8", "digits", **options)
    monkeypatch.setattr(runs, "train", None)  # must not be called
    assert runs.trained("resnet8", "digits", **options | {"statistics": "grid:1/4"}) == first
    with pytest.raises(ValueError, match=r"rate 0\.1, wanted 0\.2; channels_last True, wanted False"):
        runs.trained("resnet8", "digits", **options | {"learning_rate": 0.2, "channels_last": False})
    with pytest.raises(ValueError, match="schedule one-cycle, wanted drops:1"):
        runs.trained("resnet8", "digits", **options | {"schedule": "drops:1"})


def test_paired_interval():
    found = comparison.paired([0.01, 0.02, 0.04])
    low, high = stats.ttest_rel([0.01, 0.02, 0.04], [0.0, 0.0, 0.0]).confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert found.verdict == "not resolved"
    assert comparison.paired([0.02, 0.021, 0.019]).verdict == "above"
    assert comparison.paired([-0.02, -0.021, -0.019]).verdict == "below"
    assert comparison.paired([0.0, 0.0]).verdict == "identical"
    assert comparison.paired([0.5]) == comparison.Paired(0.5, math.inf, 1)
    assert comparison.paired([0.5]).verdict == "not resolved"


def test_the_number_of_seeds_follows_from_the_spread():
    assert comparison.seeds_needed([0.01, 0.01], 9) == 2
    assert comparison.seeds_needed([0.01, 0.02], 9) == 9
    needed = [comparison.seeds_needed([0.0, spread], 50) for spread in (0.0005, 0.002, 0.006, 0.01)]
    assert needed == sorted(needed)
    assert 2 < needed[1] < needed[3] < 50


def trial(arm, seed, accuracy):
    run = json.loads((EXPERIMENTS.parent / "benchmarks/results/digits-minimum.json").read_text())[0]
    run = leannorm.records.from_json(leannorm.records.TrainingRun, json.dumps(run))
    epochs = tuple(dataclasses.replace(e, validation_accuracy=accuracy) for e in run.history)
    return Trial(arm, seed, dataclasses.replace(run, history=epochs))


def test_differences_are_paired_over_shared_seeds_and_named_unresolved():
    arms = (Arm("BN", "full"), Arm("other", "gn:32", "BN"), Arm("never", "in", "BN"))
    found = [trial("BN", 0, 0.9), trial("BN", 1, 0.5), trial("other", 0, 0.91), trial("other", 1, 0.53)]
    text = page.table(arms, found)
    assert "| other | `gn:32` | 72.00% |" in text
    assert "| +2.00 ± 12.71 | BN | not resolved |" in text
    assert "| never | `in` | not run |" in text
    wanted = reproduce.wanted_seeds(TINY, arms[:2], found)
    assert wanted == {"BN": 2, "other": 2}
    more = dataclasses.replace(TINY, most_seeds=5)
    assert reproduce.wanted_seeds(more, arms[:2], found) == {"BN": 5, "other": 5}


@pytest.mark.parametrize(
    ("differences", "low", "high", "expected"),
    [
        ([0.010, 0.011, 0.012], 0.0, math.inf, "agrees"),
        ([0.010, 0.011, 0.012], 0.02, math.inf, "disagrees"),
        ([0.010, 0.011, 0.012], 0.011, math.inf, "not resolved"),
        ([0.010, 0.011, 0.012], -0.005, 0.005, "disagrees"),
        ([0.001, 0.001, 0.002], -0.005, 0.005, "agrees"),
        ([0.3], 0.0, math.inf, "not resolved"),
    ],
)
def test_claims_are_judged_by_the_whole_interval(differences, low, high, expected):
    claim = claims.Claim("it helps", "new", "BN", low, high, "a note")
    assert claim.verdict(comparison.paired(differences)) == expected
    found = [trial("BN", seed, 0.5) for seed in range(9)]
    found += [trial("new", seed, 0.5 + each) for seed, each in enumerate(differences)]
    *_, line = claims.table((claim,), found).splitlines()
    assert line.startswith("| it helps: new against BN |")
    assert line.endswith(f"| {len(differences)} | {expected} | a note |")


def test_claims_that_were_not_run_say_so(tmp_path):
    claim = claims.Claim("it helps", "new", "BN", -0.005, 0.005)
    assert claims.table((claim,), [trial("BN", 0, 0.5)]).endswith("| -0.5 to +0.5 |  | 0 | not run |  |")
    path = page.write_page(tmp_path, "family", "T", "I", TINY, ARMS[:1], [trial("BN", 0, 0.5)], (claim,))
    assert "## What others have found" in path.read_text()


@pytest.mark.parametrize("scale", ["cpu", "full"])
@pytest.mark.parametrize("name", reproduce.TABLES)
def test_claims_are_about_arms_that_are_run(name, scale):
    names = {arm.name for arm in reproduce.TABLES[name].arms(trials.SCALES[scale])}
    for claim in getattr(reproduce.TABLES[name], "CLAIMS", ()):
        assert {claim.arm, claim.against} <= names


def test_accuracy_is_of_the_last_tenth_of_the_epochs():
    run = trial("BN", 0, 0.5).run
    epochs = tuple(
        dataclasses.replace(run.history[0], epoch=i, validation_accuracy=a)
        for i, a in enumerate([0.9] * 18 + [0.1, 0.3])
    )
    assert Trial("BN", 0, dataclasses.replace(run, history=epochs)).accuracy == pytest.approx(0.2)
    assert Trial("BN", 0, None).accuracy == 0


@pytest.mark.parametrize("scale", trials.SCALES.values(), ids=lambda scale: scale.name)
@pytest.mark.parametrize("name", reproduce.TABLES)
def test_every_arm_is_spelled_and_stands_against_one_that_is_there(name, scale):
    arms = reproduce.TABLES[name].arms(scale)
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    for number, arm in enumerate(arms):
        leannorm.parse_target(arm.statistics)
        assert arm.against is None or arm.against in names[:number], "what others stand against is run first"
        options = arm.options(scale)
        assert options["learning_rate"] > 0
        assert scale.images >= options["batch_size"] * options["accumulate"]


def test_micro_batches_see_equal_numbers_of_images_at_rates_in_proportion():
    arms = {
        arm.name: arm.options(trials.SCALES["cpu"])
        for arm in reproduce.TABLES["micro-batch"].arms(trials.SCALES["cpu"])
    }
    assert arms["BN, batch 64"]["learning_rate"] == pytest.approx(0.05)
    assert arms["BN, batch 2"]["learning_rate"] == pytest.approx(0.1 * 2 / 128)
    assert arms["accumulated, batch 2 x 16"] == {
        "batch_size": 2,
        "accumulate": 16,
        "learning_rate": pytest.approx(0.025),
    }


def test_variants_of_the_network(monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    models = {}
    for arm in reproduce.TABLES["placement"].arms(trials.SCALES["cpu"]):
        if arm.model is not None:
            models[arm.name] = build(arm.model, classes=10, channels=3)
    gammas = {name: model.stages[0].bn1.weight[0].item() for name, model in models.items() if "gamma" in name}
    assert gammas == {"gamma 0.1": pytest.approx(0.1), "gamma 0 in the last BN of a block": 1.0}
    assert models["gamma 0 in the last BN of a block"].stages[0].bn2.weight[0] == 0
    block = models["BN after the activation"].stages[0].eval()
    block.bn1.bias.data.fill_(-1.0)
    import torch

    x = torch.randn(2, 16, 5, 5)
    out = block.bn1(torch.relu(block.conv1(x)))
    torch.testing.assert_close(block(x), block.bn2(torch.relu(block.conv2(out))) + x)


def test_images_are_unpacked_once_and_linked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scale = Scale("few", "resnet8", ".data/few", 4, 1, 2, 0.1, "one-cycle", 2, 2, "cpu")
    with pytest.raises(FileNotFoundError, match="give --archive"):
        trials.prepare(scale, tmp_path / "cifar10.tar.xz")
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "made/cifar10" / part / name).mkdir(parents=True)
            for number in range(5):
                (tmp_path / "made/cifar10" / part / name / f"{number}.jpg").write_bytes(b"image")
    with tarfile.open(tmp_path / "cifar10.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "made/cifar10", "cifar10")
    trials.prepare(scale, tmp_path / "cifar10.tar.xz")
    assert len(list((tmp_path / ".data/few/train").rglob("*.jpg"))) == 4
    assert len(list((tmp_path / ".data/few/val").rglob("*.jpg"))) == 10
    (tmp_path / "cifar10.tar.xz").unlink()
    trials.prepare(scale, tmp_path / "cifar10.tar.xz")


def test_speed_page_names_every_spelling(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "SPELLINGS", ("full", "grid:1/8", "vdn:1", "gn:32", "accumulated:4"))
    path = reproduce.reproduce("speed", TINY, results=tmp_path, docs=tmp_path)
    text = path.read_text()
    assert all(f"| `{spelling}` | " in text for spelling in speed.SPELLINGS)
    raw = json.loads((tmp_path / "speed-tiny.json").read_text())
    assert {each["statistics"] for each in raw["speeds"]} == {"torch", *speed.SPELLINGS}
    assert all(len(each["seconds"]) == 3 for each in raw["speeds"])
