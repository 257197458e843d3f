"""Differences between two runs that were repeated over seeds and seen by several judges.

    change, half = relative_effect(a, b)     # figures (S, J) of the same seeds and judges

Needs numpy and scipy alone.
"""
import numpy as np


def relative_effect(a, b, level=0.95):
    """(change, half): mean of (a - b) relative to b, and half its confidence interval.

    a, b (S, J): a figure of two runs, row s of one training seed, column j of one judge. Both runs
    share start noise and labels within a seed, so differences are taken within a seed and a judge.
    Judges measure on scales of their own: each difference is a share of its judge's mean of b.
    half is None for one seed, of which nothing can be said, and inf where some mean of b is 0.
    """
    a = np.asarray(a, float)
    b = np.asarray(b, float)
    scale = b.mean(0)                                # (J,)
    if (scale == 0).any():
        return np.inf, np.inf
    return two_way_interval((a - b) / scale, level)


def two_way_interval(x, level=0.95):
    """(mean, half the confidence interval) of x (S, J), where seeds and judges are both drawn.

    x_sj = mu + seed_s + judge_j + rest_sj, every term of a variance of its own. The variance of the
    mean is (MS_seeds + MS_judges - MS_rest) / (S J) by the mean squares of the two-way analysis of
    variance, at least the largest of the three; its degrees of freedom are Satterthwaite's (1946).
    So it is too wide rather than too narrow: where neither seeds nor judges vary, twice as wide.
    One judge leaves Student's interval over the seeds.
    """
    from scipy.stats import t as student
    x = np.asarray(x, float)
    S, J = x.shape
    mean = float(x.mean())
    if S < 2:
        return mean, None
    seeds = x.mean(1)                                # (S,)
    by_seed = float(seeds.var(ddof=1)) / S           # MS_seeds / (S J)
    variance = by_seed
    freedom = S - 1
    if J > 1:
        judges = x.mean(0)                           # (J,)
        by_judge = float(judges.var(ddof=1)) / J     # MS_judges / (S J)
        rest = x - seeds[:, None] - judges + mean
        by_rest = float((rest ** 2).sum()) / ((S - 1) * (J - 1) * S * J)
        variance = max(by_seed + by_judge - by_rest, by_seed, by_judge, by_rest)
        squares = by_seed ** 2 / (S - 1) + by_judge ** 2 / (J - 1)
        squares += by_rest ** 2 / ((S - 1) * (J - 1))
        freedom = min(S - 1, J - 1)
        if squares > 0:
            # A difference of mean squares may come out with fewer than any of its parts has.
            freedom = max(freedom, variance ** 2 / squares)
    return mean, float(student.ppf((1 + level) / 2, freedom)) * variance ** 0.5


def best_guidance(fd):
    """(figures (S, J) at the best guidance, the two choices); the halves choose for each other.

    fd (G, S, J, 2): of each guidance, seed, judge and half of the noise. The lowest mean of a half
    says which guidance is best there; it is scored on the other half, for the lowest of several
    noisy figures is too low. The mean of both ways.
    """
    fd = np.asarray(fd, float)
    chosen = fd.mean((1, 2)).argmin(0)               # (2,)
    scored = [fd[chosen[0], :, :, 1], fd[chosen[1], :, :, 0]]
    return np.mean(scored, 0), [int(k) for k in chosen]


def mean_until(steps, values, end):
    """Mean height (J,) of a curve from its first point to `end`, by trapezoids.

    steps (P,) rising, values (P, J). Early quality as one number. None where the curve begins at
    `end` or later, or does not reach it.
    """
    steps = np.asarray(steps, float)
    values = np.asarray(values, float)
    if end <= steps[0] or end > steps[-1]:
        return None
    last = [np.interp(end, steps, column) for column in values.T]     # (J,)
    inside = steps < end
    x = np.append(steps[inside], end)                # (Q,)
    y = np.vstack([values[inside], last])            # (Q, J)
    area = ((y[1:] + y[:-1]) / 2 * np.diff(x)[:, None]).sum(0)
    return area / (end - steps[0])
