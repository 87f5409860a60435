"""When: the same tolerance in a 300-step fine-tune and in a 300-epoch run, with no setting changed."""

import math

import pytest

from hf_cuttlefish.maths.convergence import has_converged, relative_slopes


def settle(total, every, start=40.0, end=10.0, share=0.05):
    """A stable rank that falls from start to end with a time constant that is a share of the run, as from scratch."""
    steps = list(range(0, total // 2, every))
    return steps, [end + (start - end) * math.exp(-s / (share * total)) for s in steps]


def first_convergence(steps, ranks, total, tolerance=1.0):
    for i in range(3, len(steps) + 1):
        if has_converged(steps[:i], {"a": ranks[:i]}, total, tolerance):
            return steps[i - 1] / total
    return None


@pytest.mark.parametrize("total", [300, 3_000, 120_000])
def test_the_same_share_of_the_run_whatever_its_length(total):
    steps, ranks = settle(total, total // 30)
    assert first_convergence(steps, ranks, total) == pytest.approx(
        first_convergence(*settle(30_000, 1_000), 30_000), abs=0.04
    )
    assert 0.1 < first_convergence(steps, ranks, total) < 0.4


def test_the_size_of_the_layer_does_not_matter():
    steps, ranks = settle(300, 10)
    assert relative_slopes(steps, {"a": ranks}, 300)["a"] == pytest.approx(
        relative_slopes(steps, {"a": [50 * r for r in ranks]}, 300)["a"]
    )


def test_a_fine_tune_whose_ranks_hardly_move_converges_at_once():
    assert has_converged([0, 10, 20], {"a": [20.0, 20.1, 20.15], "b": [5.0, 5.0, 5.0]}, 300, 1.0)


def test_one_moving_layer_is_enough_to_wait():
    assert not has_converged([0, 10, 20], {"a": [20.0, 20.0, 20.0], "b": [20.0, 15.0, 11.0]}, 300, 1.0)


def test_no_decision_on_too_little_or_broken_numbers():
    assert not has_converged([0, 10], {"a": [5.0, 5.0]}, 300, 1.0)
    assert not has_converged([0, 10, 20], {"a": [5.0, math.nan, 5.0]}, 300, 1.0)
    assert not has_converged([], {}, 300, 1.0)
