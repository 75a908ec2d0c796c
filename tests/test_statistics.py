import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import leannorm
from leannorm import parse_statistics
from leannorm.statistics import DISTRIBUTIONS, Regions, Statistics

fractions = st.one_of(st.sampled_from([1.0, 0.5, 1 / 3, 1 / 32, 1 / 64]), st.floats(1e-3, 1.0))
minima = st.integers(1, 200)
places = st.sampled_from(["fixed", "step"])
sampled = st.one_of(
    st.builds(leannorm.NaiveSampling, fractions, minimum=minima, between_steps=st.booleans()),
    st.builds(leannorm.BatchSampling, fractions, minimum=minima, between_steps=st.booleans()),
    st.builds(leannorm.FeatureSampling, fractions, places, minimum=minima, seed=st.integers(0, 9)),
    st.builds(leannorm.GridSampling, fractions, places, minimum=minima, between_steps=st.booleans()),
)
virtual = st.builds(leannorm.VirtualDataset, st.integers(1, 3), st.sampled_from(DISTRIBUTIONS))
sums = st.lists(sampled, min_size=1, max_size=2).flatmap(
    lambda some: st.tuples(virtual, st.lists(st.floats(0.1, 9), min_size=len(some) + 1, max_size=len(some) + 1)).map(
        lambda rest: leannorm.WeightedSum((*some, rest[0]), tuple(rest[1]))
    )
)
sources = st.one_of(st.just(leannorm.FullBatch()), sampled, virtual, sums)
shapes = st.tuples(st.integers(5, 40), st.integers(1, 4)).flatmap(
    lambda nc: st.lists(st.integers(1, 20), max_size=3).map(lambda spatial: (*nc, *spatial))
)


def boxes_of(regions: Regions, dimensions: int) -> list[list[tuple[int, int, int, int]]]:
    flat = regions.boxes
    fours = [flat[i : i + 4] for i in range(0, len(flat), 4)]
    return [fours[i : i + dimensions] for i in range(0, len(fours), dimensions)]


@given(sources, shapes, st.integers(0, 2**32 - 1), st.booleans())
def test_every_place_lies_inside_the_tensor(source: Statistics, shape, place, by_rows):
    regions = source.regions(shape, place, by_rows)
    sizes = (shape[0], *shape[2:])
    for box in boxes_of(regions, len(sizes)):
        for (start, span, count, step), size in zip(box, sizes, strict=True):
            assert start >= 0
            assert span >= 1
            assert count >= 1
            assert step >= 1
            assert start + (span - 1) + (count - 1) * step < size
    assert not regions.weights or math.isclose(sum(regions.weights), 1)


@given(sampled, shapes, st.booleans())
def test_the_minimum_is_kept_wherever_the_tensor_has_that_many(source, shape, by_rows):
    regions = source.regions(shape, by_rows=by_rows)
    elements = math.prod((shape[0], *shape[2:]))
    taken = round(1 / regions.inverse_count)
    assert min(elements, source.minimum) <= taken <= elements


def test_counts_that_are_rounded_below_the_minimum_grow():
    for shape, by_rows, expected in (
        ((15, 3, 8, 8), False, [(3, 3), (2, 4)]),  # rounded 2 x 2: 60 of 64
        ((4, 3, 9, 7), False, [(5, 2), (4, 2)]),  # rounded 5 x 3: 60 of 64
        ((1, 3, 9, 11), True, [(7, 1), (11, 1)]),  # 6 of 9 rows are every other one: 55; whole rows stay whole
    ):
        regions = leannorm.GridSampling(1 / 32).regions(shape, by_rows=by_rows)
        box = (boxes_of(regions, 3) or [[(0, 1, size, 1) for size in (shape[0], *shape[2:])]])[0]
        assert [dimension[2:] for dimension in box[1:]] == expected, shape


def test_growing_to_the_minimum_compiles():
    torch._dynamo.reset()
    layer = leannorm.BatchNorm2d(3, statistics=leannorm.GridSampling(1 / 32))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for samples in (15, 20):
        x = torch.randn(samples, 3, 8, 8)
        torch.testing.assert_close(compiled(x), layer(x))


@given(
    st.sampled_from(["fs", "grid"]), st.integers(20, 60), st.sampled_from([1 / 4, 1 / 8, 1 / 16, 1 / 32]), st.booleans()
)
def test_a_large_map_gives_about_the_fraction(name, size, fraction, by_rows):
    source = parse_statistics(f"{name}:{fraction}")
    (box,) = boxes_of(source.regions((8, 3, size, size), by_rows=by_rows), 3)
    share = box[1][2] * box[2][2] / size**2
    assert 0.6 * fraction <= share <= 1.5 * fraction


def test_a_grid_spreads_over_the_map_and_a_patch_is_square():
    (grid,) = boxes_of(leannorm.GridSampling(1 / 32).regions((8, 3, 56, 56)), 3)
    (patch,) = boxes_of(leannorm.FeatureSampling(1 / 32).regions((8, 3, 56, 56)), 3)
    assert [dimension[2:] for dimension in grid[1:]] == [(10, 6), (10, 6)]
    assert [dimension[2:] for dimension in patch[1:]] == [(10, 1), (10, 1)]


def test_a_grid_on_contiguous_memory_takes_whole_rows_where_there_are_two():
    x = torch.empty(8, 3, 56, 56)
    for fraction, rows in ((1 / 8, [(7, 8), (56, 1)]), (1 / 56, [(7, 8), (8, 7)])):
        (grid,) = boxes_of(leannorm.GridSampling(fraction).regions_of(x), 3)
        assert [dimension[2:] for dimension in grid[1:]] == rows
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert leannorm.GridSampling(1 / 8).regions_of(channels_last) == leannorm.GridSampling(1 / 8).regions(x.shape)


def test_samples_are_the_only_dimension_of_a_matrix():
    for spelling in ("fs:1/4", "grid:1/4", "bs:1/4", "ns:1/4"):
        regions = parse_statistics(spelling).regions((256, 10))
        assert regions.boxes[2] == 64, spelling


def test_fixed_places_depend_on_seed_place_and_size_alone():
    source = leannorm.FeatureSampling(1 / 32)
    here = source.regions((8, 3, 28, 28), place=1)
    assert here.boxes[4:] == leannorm.FeatureSampling(1 / 32).regions((16, 5, 28, 28), place=1).boxes[4:]
    assert here.draws == 0
    starts = {source.regions((8, 3, 28, 28), place=p).boxes[4::4] for p in range(20)}
    assert len(starts) > 10
    assert source.regions((8, 3, 28, 28), 1) != leannorm.FeatureSampling(1 / 32, seed=1).regions((8, 3, 28, 28), 1)
    # written down, since trained networks rely on their places
    assert leannorm.GridSampling(1 / 8).regions((8, 3, 32, 32), place=5).boxes[4:] == (1, 1, 11, 3, 1, 1, 11, 3)


def test_drawn_places_take_one_number_a_dimension():
    regions = leannorm.BatchSampling(1 / 4).regions((64, 3, 8, 8))
    assert regions.draws == 3
    assert regions.boxes[:4] == (0, 49, 16, 1)


def test_whole_tensor_is_no_region():
    assert leannorm.FullBatch().regions((4, 3, 2, 2)).boxes == ()
    assert leannorm.GridSampling(1.0).regions((4, 3, 2, 2)).boxes == ()
    assert leannorm.BatchSampling(1 / 32).regions((4, 3, 2, 2)).boxes == (), "16 elements are fewer than the minimum"


def test_virtual_samples_are_the_last_and_no_other_source_sees_them():
    regions = (leannorm.FullBatch() + leannorm.VirtualDataset(2)).regions((10, 3, 4, 4))
    real, virtual = boxes_of(regions, 3)
    assert real[0] == (0, 1, 8, 1)
    assert virtual[0] == (8, 1, 2, 1)
    assert regions.weights == (0.5, 0.5)


def test_unbiased_factor():
    assert leannorm.FullBatch().regions((4, 3, 2, 2)).unbiased == pytest.approx(16 / 15)
    regions = (leannorm.FullBatch() + leannorm.VirtualDataset(2)).regions((10, 3, 4, 4))
    assert regions.unbiased == pytest.approx(1 / (1 - (0.25 / 128 + 0.25 / 32)))


@given(sources)
def test_spelling_round_trip(source):
    parsed = parse_statistics(str(source))
    if isinstance(source, leannorm.WeightedSum):
        assert parsed.sources == source.sources
        assert parsed.weights == pytest.approx(source.weights)
    else:
        assert parsed == source


def test_three_sources_added_weigh_equally():
    total = leannorm.FullBatch() + leannorm.GridSampling(1 / 8) + leannorm.VirtualDataset(1)
    assert total.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert total.virtual == 1


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("gird:1/8", "'gird' is not a source"),
        ("grid:0", "fraction must lie in"),
        ("grid:1/0", "not a number"),
        ("grid:x", "not a number"),
        ("1e400*grid:1/4+fs:1/4", "not a number"),
        ("grid:1/8@often", "no option 'often'"),
        ("bs:1/8@step", "no option 'step'"),
        ("grid:1/8@minimum=0", "minimum must be"),
        ("vdn:0", "samples must be"),
        ("vdn:1.5", "whole number"),
        ("vdn:1+vdn:2", "one VirtualDataset"),
        ("0.5*grid:1/8", "needs a sum"),
        ("0.5*grid:1/8+vdn:1", "every source"),
        ("", "is not a source"),
    ],
)
def test_bad_spellings_say_what_is_wrong_and_what_is_allowed(spelling, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_statistics(spelling)
    assert "grid:1/32" in str(error.value)


def test_bad_values():
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got 2"):
        leannorm.GridSampling(2)
    with pytest.raises(ValueError, match="position must be"):
        leannorm.FeatureSampling(1 / 2, "often")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="distribution must be"):
        leannorm.VirtualDataset(1, "cauchy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unequal weights"):
        _ = parse_statistics("0.7*full+0.3*vdn:1") + leannorm.GridSampling(1 / 2)
