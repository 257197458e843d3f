"""models/effects.py against simulations whose truth is known, scipy, and plain loops."""
import math

import numpy as np
import pytest
from scipy import stats

from models.effects import best_guidance, mean_until, relative_effect, two_way_interval


@pytest.mark.parametrize("seeds, judges, rest", [(0.1, 0.3, 0.05), (0.3, 0.1, 0.05), (0.0, 0.0, 0.2), (0.2, 0.2, 0.2), (0.0, 0.3, 0.0)])
@pytest.mark.parametrize("S, J", [(3, 8), (5, 3)])
def test_the_interval_holds_the_truth_when_seeds_and_judges_are_drawn(seeds, judges, rest, S, J):
    """2 000 experiments with known variance components: 95 % intervals miss the truth in 5 % of them, at most 8 % (sd of the share 0.5 %). Nor are they wide for nothing:
    the median half is at most 1.3 times Student's for the true variance of the mean and the fewest degrees of freedom."""
    rng = np.random.default_rng(0)
    missed = 0
    halves = []
    for _ in range(2000):
        x = 0.2 + rng.normal(0, seeds, (S, 1)) + rng.normal(0, judges, (1, J)) + rng.normal(0, rest, (S, J))
        mean, half = two_way_interval(x)
        missed += abs(mean - 0.2) > half
        halves.append(half)
    true = (seeds**2 / S + judges**2 / J + rest**2 / (S * J)) ** 0.5
    assert missed / 2000 < 0.08
    assert np.median(halves) < 1.3 * stats.t.ppf(0.975, min(S, J) - 1) * true
    if judges > seeds:
        # The interval over seeds alone, which ignores that the judges are a draw too, fails: the test can tell.
        narrow = 0
        for _ in range(500):
            x = 0.2 + rng.normal(0, seeds, (S, 1)) + rng.normal(0, judges, (1, J)) + rng.normal(0, rest, (S, J))
            narrow += abs(x.mean() - 0.2) > two_way_interval(x.mean(1, keepdims=True))[1]
        assert narrow / 500 > 0.1


def test_one_judge_leaves_student_s_paired_test():
    rng = np.random.default_rng(1)
    for _ in range(20):
        a = rng.normal(1.1, 0.1, (4, 1))
        b = rng.normal(1, 0.1, (4, 1))
        change, half = relative_effect(a, b)
        test = stats.ttest_rel(a[:, 0], b[:, 0])
        low, high = test.confidence_interval(0.95)
        assert math.isclose(change, (a.mean() - b.mean()) / b.mean())
        assert math.isclose(half, (high - low) / 2 / b.mean(), rel_tol=1e-9)


def test_a_shared_shift_of_seed_or_judge_cancels():
    """What a seed or a judge adds to both runs is no difference between them."""
    rng = np.random.default_rng(2)
    b = 1 + rng.normal(0, 0.3, (3, 1)) + rng.normal(0, 0.3, (1, 5))
    change, half = relative_effect(b + 0.1 * b.mean(0), b)
    assert math.isclose(change, 0.1) and half < 1e-9


def test_one_seed_has_no_interval_and_a_mean_of_zero_no_share():
    assert relative_effect([[2.0, 4.0]], [[1.0, 2.0]]) == (1.0, None)
    assert relative_effect([[1.0], [1.0]], [[0.0], [0.0]]) == (math.inf, math.inf)
    assert two_way_interval(np.ones((3, 4))) == (1.0, 0.0)


def test_the_best_guidance_is_chosen_on_one_half_and_scored_on_the_other():
    # Guidance 0 wins by luck in half 0 alone; guidance 1 is the better one in truth.
    fd = np.zeros((2, 1, 1, 2))
    fd[0, 0, 0] = [0.5, 2.0]
    fd[1, 0, 0] = [1.0, 1.0]
    values, chosen = best_guidance(fd)
    assert chosen == [0, 1] and values == [[(2.0 + 1.0) / 2]]


def test_choosing_and_scoring_on_the_same_half_would_flatter():
    rng = np.random.default_rng(3)
    honest, naive = [], []
    for _ in range(500):
        fd = 1 + rng.normal(0, 0.2, (4, 1, 1, 2))               # four guidances that are equally good
        honest.append(best_guidance(fd)[0].item())
        naive.append(fd.mean((1, 2)).min(0).mean())
    assert abs(np.mean(honest) - 1) < 0.02 and np.mean(naive) < 0.85


def test_area_is_the_integral_of_the_broken_line():
    steps = [100, 200, 400, 1000]
    values = np.array([[9.0, 3.0], [5.0, 2.0], [4.0, 1.0], [2.0, 0.5]])
    fine = np.linspace(100, 300, 200_001)
    for j, got in enumerate(mean_until(steps, values, 300)):
        assert math.isclose(got, np.interp(fine, steps, values[:, j]).mean(), rel_tol=1e-5)
    assert mean_until(steps, values, 100) is None and mean_until(steps, values, 1001) is None
    assert mean_until(steps, np.full((4, 1), 7.0), 1000) == pytest.approx([7.0])
