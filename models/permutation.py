"""Permutation tests of the weights of classes: what would they be if the classes meant nothing?

An image that is hard stays hard, so it is images that are exchanged, once for a whole record: to
deal the losses anew in every step makes a band that is several times too narrow.
"""
from types import SimpleNamespace

import torch


def permuted_null(path, excess, rows, labels, burn_in=0, permutations=200, generator=None):
    """abar (permutations, K) of the same record where no class means anything.

    path(excess, labels): yields a (..., K) after each step; excess (steps, B); rows (steps, B)
    int64 into labels (M,), those of all kept images. No training: that the proxy would have been
    trained with another a is left out.
    """
    parts = []
    # 200 at once, for each holds a number per image.
    for done in range(0, permutations, 200):
        P = min(200, permutations - done)
        record = permuted_record(excess, rows, labels, P, burn_in, generator)
        late = (a for step, a in enumerate(path(*record)) if step >= burn_in)
        parts.append(sum(late) / (len(excess) - burn_in))             # (P, K)
    return torch.cat(parts)


def permuted_record(excess, rows, labels, permutations, burn_in=0, generator=None):
    """A record of DRO under classes that mean nothing: two iterables over its steps.

    excess (steps, B) with rows (steps, B) int64 into labels (M,) -> excess, (B,) or (P, B), and
    classes, (P, B) int64. Where all classes have the same number of images, each permutation deals
    the classes out anew among all M images, and an image keeps its own in every step.

    Where they have not, images of a small class are drawn more often, and so differ from others by
    design: dealt to a large class they would change how many images of it a step holds, and with it
    the bias of lambda = max(mean, 0). There the classes and places stay, and the images drawn after
    the burn-in exchange their own mean excess, beyond that of the step.
    """
    drawn, at = rows.unique(return_inverse=True)                      # (D,), (steps, B)
    counts = labels.bincount()
    counts = counts[counts > 0]
    if (counts == counts[0]).all():
        members = deal(labels, permutations, generator)[:, drawn]     # (P, D)
        return excess, (members[:, i].long() for i in at)
    own = image_means(excess[burn_in:], at[burn_in:], len(drawn))     # (D,)
    known = own.isfinite()
    # An image that was never drawn after the burn-in has no mean to give, and needs none.
    dealt = own.nan_to_num().repeat(permutations, 1)                  # (P, D)
    dealt[:, known] = deal(own[known], permutations, generator)
    rest = excess - own.nan_to_num()[at]                              # (steps, B)
    classes = labels[rows]
    return ((e + dealt[:, i] for e, i in zip(rest, at)),
            (y.expand(permutations, -1) for y in classes))


def deal(values, permutations, generator=None):
    """(permutations, n): the values (n,), 32 bits each, in as many random orders."""
    kind = torch.float32 if values.is_floating_point() else torch.int32
    values = values.to(kind)
    orders = (torch.randperm(len(values), generator=generator) for _ in range(permutations))
    return torch.stack([values[order] for order in orders])


def image_means(excess, at, D):
    """(D,) mean over its draws of an image's excess beyond its step's mean; NaN without a draw.

    excess (steps, B), at (steps, B) int64 < D. A value that is not finite does not count.
    """
    excess = torch.where(excess.isfinite(), excess, torch.nan).double()
    beyond = (excess - excess.nanmean(1, keepdim=True)).flatten()
    ok = beyond.isfinite()
    sums = torch.zeros(D, dtype=torch.float64).scatter_add_(0, at.flatten()[ok], beyond[ok])
    return (sums / at.flatten()[ok].bincount(minlength=D)).to(torch.float32)


def permutation_test(x, null):
    """Is any of x (K,) further from the centre than under the null (P, K)? x and null: log weights.

    |z|, the distance from the mean in standard deviations, is compared with that of the same class
    in all P + 1 records, the real one among them (whence the + 1 of the p values; the smallest is
    1 / (P + 1)). p (K,), holm (K,): two-sided, the latter corrected for K classes. overall: p of
    max |z| over the classes, because few classes stand out where any does; it needs no correction,
    and low, high (K,) show it: in 5 % of the records without meaning some class leaves them.
    """
    records = torch.cat([x[None], null])                              # (P + 1, K)
    centre = records.mean(0)
    sd = records.std(0)
    # Without any spread every |z| is 0, and every p is 1.
    z = ((records - centre) / sd).abs().nan_to_num()                  # (P + 1, K)
    p = (z >= z[0] - 1e-9).double().mean(0)
    largest = z.amax(1)                                               # (P + 1,)
    overall = (largest >= largest[0] - 1e-9).double().mean().item()
    limit = largest.sort(descending=True).values[len(records) // 20]
    return SimpleNamespace(p=p, holm=holm(p), overall=overall, low=centre - limit * sd,
                           high=centre + limit * sd)


def holm(p):
    """p values (K,) corrected for K tests (Holm 1979): step-down, family-wise."""
    K = len(p)
    order = p.argsort()
    stepped = (p[order] * torch.arange(K, 0, -1)).cummax(0).values.clamp(max=1)
    return torch.empty_like(stepped).scatter_(0, order, stepped)


def derangement(K, generator=None):
    """(K,) a random order in which nothing keeps its place, all of them alike; K >= 2."""
    if K < 2:
        raise ValueError("one class cannot change its place")
    order = torch.arange(K)
    while (order == torch.arange(K)).any():
        order = torch.randperm(K, generator=generator)                # about e tries
    return order


def told(names, w, low, high, mean, test, permutations):
    """The weights beside their null as text, and the classes found, heaviest first.

    w, low, high, mean (K,); test: of permutation_test.
    """
    K = len(names)
    order = w.argsort(descending=True).tolist()
    lines = [f"{'class':<24}{'weight':>8}{'null':>18}{'p (Holm)':>10}{'mean excess':>13}"]
    shown = range(K)
    if K > 20:
        lines[0] += "   (the ten heaviest and the ten lightest)"
        shown = order[:10] + order[-10:]
    for k in shown:
        band = f"{low[k]:.3f} .. {high[k]:.3f}"
        lines.append(f"{names[k][:23]:<24}{w[k]:>8.3f}{band:>18}{test.holm[k]:>10.3f}"
                     f"{mean[k]:>13.5f}")
    found = [f"{names[k]} ({w[k]:.3f})" for k in order if test.holm[k] <= 0.05]
    said = ", ".join(found) or "none: classes that mean nothing give such weights, too"
    lines.append(f"classes that stand out (Holm p <= 0.05): {said}")
    lines.append(f"all classes together: p {test.overall:.3f} (the largest |z| of a log weight, "
                 f"{permutations:,} permutations of the images)")
    if K / (permutations + 1) > 0.05:
        lines.append(f"note: no Holm p of {K} classes can fall to 0.05 in so few permutations; "
                     f"give --permutations {20 * K:,}")
    return "\n".join(lines), found
