"""When a run checks, gathers and switches: from numbers alone, without a model."""

import pytest

from hf_cuttlefish import CuttlefishConfig
from hf_cuttlefish.decide.schedule import CHECKS_PER_RUN, Schedule


def walk(schedule, ranks=lambda step: 10.0, first=0, last=None, layers=("a", "b")):
    """Go through a run as `Cuttlefish` does: (steps that gathered, the step of the switch or None).

    Args:
        ranks: step -> the stable rank of every layer then.
    """
    steps, seen = [first], {name: [ranks(first)] for name in layers}
    gathered = []
    if schedule.is_known_at_once:
        schedule.decide(first, steps, seen)
    for step in range(first + 1, (last or schedule.total_steps) + 1):
        if schedule.is_gathering(step - 1):
            gathered.append(step)
        if schedule.is_check(step):
            steps.append(step)
            for values in seen.values():
                values.append(ranks(step))
        schedule.decide(step, steps, seen)
        if schedule.is_due(step):
            return gathered, step
    return gathered, None


def falling(step):
    """A stable rank that never comes to rest."""
    return 1000.0 / (step + 1)


@pytest.mark.parametrize("total", [1, 2, 7, 30, 100, 1000])
def test_a_run_checks_about_thirty_times(total):
    schedule = Schedule(CuttlefishConfig(), total)
    checks = [step for step in range(1, total + 1) if schedule.is_check(step)]
    assert schedule.check_steps == max(1, total // CHECKS_PER_RUN)
    assert min(total, CHECKS_PER_RUN) <= len(checks) <= 2 * CHECKS_PER_RUN
    assert Schedule(CuttlefishConfig(check_steps=4), total).check_steps == 4


@pytest.mark.parametrize(("total", "expected"), [(10, 3), (50, 4), (300, 12), (1000, 24), (100_000, 24)])
def test_statistics_take_a_share_of_the_run_within_limits(total, expected):
    """4% of it, from 4 to 24 steps, and no more than there are before the latest switch."""
    assert Schedule(CuttlefishConfig(latest_switch=0.3, earliest_switch=0.1), total).statistics_steps == expected


def test_only_the_loss_rule_gathers_statistics():
    assert Schedule(CuttlefishConfig(rank_rule="energy"), 100).statistics_steps == 0
    assert Schedule(CuttlefishConfig(statistics_steps=9), 100).statistics_steps == 9
    assert Schedule(CuttlefishConfig(statistics_steps=9, switch_step=5), 100).statistics_steps == 5


@pytest.mark.parametrize("step", [1, 2, 17, 40])
def test_a_fixed_step_is_kept_and_statistics_end_at_it(step):
    schedule = Schedule(CuttlefishConfig(switch_step=step, statistics_steps=4), 40)
    gathered, switched = walk(schedule, falling)
    assert switched == step and schedule.reason == "switch_step"
    assert gathered == list(range(max(1, step - 3), step + 1))


def test_stable_ranks_at_rest_switch_at_the_earliest_step_and_moving_ones_at_the_latest():
    config = CuttlefishConfig(earliest_switch=0.25, latest_switch=0.6, check_steps=1, statistics_steps=4)
    still, moving = Schedule(config, 200), Schedule(config, 200)
    gathered, switched = walk(still)
    assert switched == still.earliest_step == 50 and still.reason == "stable ranks have converged"
    assert gathered == [47, 48, 49, 50]
    gathered, switched = walk(moving, falling)
    assert switched == moving.latest_step == 120 and moving.reason == "latest_switch"
    assert gathered == [117, 118, 119, 120]


def test_ranks_that_come_to_rest_in_between_switch_some_steps_after():
    config = CuttlefishConfig(earliest_switch=0.1, latest_switch=0.9, check_steps=1, statistics_steps=5)
    schedule = Schedule(config, 300)
    gathered, switched = walk(schedule, lambda step: max(20.0, 200.0 - 2 * step))  # at rest from step 90 on
    assert 90 < switched < 270 and schedule.reason == "stable ranks have converged"
    assert gathered == list(range(switched - 4, switched + 1))


def test_one_decision_is_final():
    schedule = Schedule(CuttlefishConfig(earliest_switch=0.1, check_steps=1), 100)
    walk(schedule)
    at = schedule.switch_at
    schedule.decide(90, [0, 90], {"a": [1.0, 500.0]})
    assert schedule.switch_at == at


def test_no_check_on_the_step_of_the_switch():
    schedule = Schedule(CuttlefishConfig(switch_step=6, check_steps=2), 20)
    schedule.decide(0, [0], {"a": [1.0]})
    assert [step for step in range(1, 10) if schedule.is_check(step)] == [2, 4, 8]


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_a_run_of_a_few_steps_switches_all_the_same(total):
    schedule = Schedule(CuttlefishConfig(), total)
    gathered, switched = walk(schedule, falling)
    assert schedule.is_known_at_once and switched == schedule.latest_step >= 1
    assert gathered == list(range(switched - len(gathered) + 1, switched + 1)) and gathered


@pytest.mark.parametrize("joined", [10, 27, 28, 35])
def test_a_run_that_is_joined_later_gathers_before_it_switches(joined):
    """latest_switch is step 30: past it, or too near for statistics, the switch comes as soon as they are there."""
    config = CuttlefishConfig(earliest_switch=0.1, latest_switch=0.3, statistics_steps=4, check_steps=1)
    schedule = Schedule(config, 100)
    schedule.start_at(joined)
    gathered, switched = walk(schedule, falling, first=joined)
    assert switched == (30 if joined == 10 else joined + 4) and schedule.reason == "latest_switch"
    assert gathered == list(range(switched - 3, switched + 1))


def test_joining_at_the_very_end_stays_within_the_run():
    schedule = Schedule(CuttlefishConfig(statistics_steps=4), 100)
    schedule.start_at(98)
    assert schedule.switch_at == 100


def test_joining_past_a_fixed_step_is_refused():
    schedule = Schedule(CuttlefishConfig(switch_step=6), 20)
    schedule.start_at(5)
    for step in (6, 9):
        with pytest.raises(ValueError, match=f"switch_step is 6, but the run resumes at step {step}"):
            schedule.start_at(step)


def test_lost_statistics_postpone_the_switch_by_as_many_steps():
    schedule = Schedule(CuttlefishConfig(switch_step=10, statistics_steps=4), 40)
    schedule.decide(0, [0], {"a": [1.0]})
    assert schedule.postpone(8) == 12 == schedule.switch_at
    assert schedule.postpone(3) == 12  # no earlier than it was
    assert schedule.postpone(39) == 40


def test_bad_arguments_are_named():
    for wrong in (1.5, True, "9"):
        with pytest.raises(TypeError, match="total_steps must be a whole number"):
            Schedule(CuttlefishConfig(), wrong)
    with pytest.raises(ValueError, match="total_steps is 0"):
        Schedule(CuttlefishConfig(), 0)
    with pytest.raises(ValueError, match="switch_step is 9, but the run has 3 steps"):
        Schedule(CuttlefishConfig(switch_step=9), 3).check_fits()
    Schedule(CuttlefishConfig(switch_step=3), 3).check_fits()
