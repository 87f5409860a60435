"""The weights' travel: straight walks, random ones, too few samples, and a state that goes round."""

import pytest
import torch

from hf_cuttlefish.measure.heading import ENTRIES, Heading

STRETCH = 5


def walk(moves, stretch=STRETCH):
    """A heading that has seen a walk of these moves, one a step, sampled once a stretch."""
    heading, at = Heading(stretch), torch.zeros_like(moves[0])
    heading.note(0, {"a": at})
    for step, move in enumerate(moves, 1):
        at = at + move
        if step % stretch == 0:
            heading.note(step, {"a": at})
    return heading


def test_a_straight_walk_is_aligned_whatever_its_pace():
    direction = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    moves = [direction * (0.1 + i % 3) for i in range(4 * STRETCH)]
    assert walk(moves).alignment(4 * STRETCH) == pytest.approx(1, abs=1e-5)


def test_a_turned_walk_is_misaligned():
    direction = torch.ones(30, 30)
    moves = [direction] * 2 * STRETCH + [-direction] * 2 * STRETCH
    assert walk(moves).alignment(4 * STRETCH) == pytest.approx(-1, abs=1e-5)


def test_a_random_walk_has_no_direction():
    g = torch.Generator().manual_seed(0)
    moves = [torch.randn(64, 64, generator=g) for _ in range(4 * STRETCH)]
    assert abs(walk(moves).alignment(4 * STRETCH)) < 0.08  # a cosine of 1,024 entries scatters by 0.03


def test_the_stretch_between_is_left_out():
    """Steps that remember the one before, as with momentum, are not taken for a direction."""
    g = torch.Generator().manual_seed(0)
    noise, velocity, moves = [torch.randn(64, 64, generator=g) for _ in range(48)], torch.zeros(64, 64), []
    for n in noise:
        velocity = 0.9 * velocity + n
        moves.append(velocity)
    assert abs(walk(moves, 12).alignment(48)) < 0.15


def test_layers_count_alike_and_those_that_rest_do_not():
    heading = Heading(STRETCH)
    for step in range(0, 21, STRETCH):
        heading.note(step, {"goes": torch.full((9, 9), float(step)), "rests": torch.ones(9, 9)})
    assert heading.alignment(20) == pytest.approx(1, abs=1e-5)


def test_too_few_samples_say_nothing():
    moves = [torch.ones(8, 8)] * 3 * STRETCH
    assert walk(moves).alignment(3 * STRETCH) is None
    assert Heading(STRETCH).alignment(20) is None
    assert walk([torch.ones(8, 8)] * 4 * STRETCH).alignment(6 * STRETCH) is None  # the last samples are too old


def test_no_more_is_kept_than_is_compared():
    heading = walk([torch.ones(400, 300)] * 20 * STRETCH)
    assert len(heading.samples) <= 6
    assert all(len(s["a"]) < 2 * ENTRIES for s in heading.samples.values())


@pytest.mark.parametrize("width", [384, 768, 1024])
def test_a_sample_sees_all_columns(width):
    columns = torch.arange(width, dtype=torch.float32).expand(width, width)
    heading = Heading(STRETCH)
    heading.note(0, {"a": columns})
    assert len(heading.samples[0]["a"].unique()) > width / 4


def test_the_state_goes_round():
    g = torch.Generator().manual_seed(1)
    heading = walk([torch.randn(20, 20, generator=g) + 0.3 for _ in range(4 * STRETCH)])
    again = Heading(STRETCH)
    again.load_state_dict({**heading.state_dict(), "sums/a/count": torch.ones(())})
    assert again.alignment(20) == heading.alignment(20)
    assert all(v.is_contiguous() for v in heading.state_dict().values())
