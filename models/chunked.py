"""Matrices that lie on disk and may be larger than memory: read by chunks of rows, as float64.

z is an array, a memory map or LazyRows (n, D). Nothing here knows what the rows stand for.
"""
import numpy as np


class LazyRows:
    """Rows `index` of the matrix z as float64, read only when sliced: z[a:b] or z[a:b, c:d]."""

    def __init__(self, z, index):
        self.z = z
        self.index = index
        self.shape = (len(index), z.shape[1])

    def __getitem__(self, key):
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        return np.asarray(self.z[self.index[rows], columns], np.float64)


def rows_of(array, rows, most=2**25):
    """array[rows] as float64; where these are `most` numbers or more, LazyRows."""
    if array.ndim == 2 and len(rows) * array.shape[1] >= most:
        return LazyRows(array, rows)
    return np.asarray(array[rows], np.float64)


def chunks(z, width=0, limit=2**26):
    """The rows of z, as many at once as `limit` bytes hold.

    width: of a matrix (rows, width) that the caller makes of a chunk, and that has to fit as well.
    """
    step = max(1, limit // (8 * max(z.shape[1], width, 1)))
    for lo in range(0, z.shape[0], step):
        yield np.asarray(z[lo:lo + step], np.float64)


def mean_row(z):
    """mu (D,)."""
    return sum(x.sum(0) for x in chunks(z)) / z.shape[0]


def median_row(z):
    """The median of every column, (D,)."""
    n, D = z.shape
    width = max(1, 2**25 // n)                   # by column blocks: a median needs all rows at once
    blocks = (np.asarray(z[:, lo:lo + width], np.float64) for lo in range(0, D, width))
    return np.concatenate([np.median(x, axis=0) for x in blocks])


def squared_norms(z):
    """|z_i|^2, (n,)."""
    return np.concatenate([(x * x).sum(1) for x in chunks(z)])


def distances(z, centre):
    """|z_i - centre|, (n,), for a centre (D,)."""
    return np.concatenate([np.sqrt(((x - centre) ** 2).sum(1)) for x in chunks(z)])


def products(z, c, width=0):
    """z c: (n,) for a vector c (D,), (n, width) for a matrix c (D, width)."""
    return np.concatenate([x @ c for x in chunks(z, width)])


def squared_distances(z, sq, i):
    """|z_j - z_i|^2 to row i, (n,), from sq = squared_norms(z): one product, no difference."""
    # Rounding makes some of them negative.
    return np.maximum(sq - 2 * products(z, z[i:i + 1][0]) + sq[i], 0)


def kmeans(z, k, rng, iterations=10):
    """Centres (k, D) and sizes (k,): k-means++, then Lloyd's steps.

    A centre without rows stays in place.
    """
    C = spread_centres(z, k, rng)
    nearest = None
    for _ in range(iterations):
        last = nearest
        nearest, sums = assign(z, C)
        sizes = np.bincount(nearest, minlength=k)                        # (k,)
        used = sizes > 0
        C[used] = sums[used] / sizes[used, None]
        if np.array_equal(nearest, last):
            break
    return C, sizes


def spread_centres(z, k, rng):
    """k-means++ (Arthur and Vassilvitskii 2007): k rows (k, D), far from each other.

    Each is drawn in proportion to its squared distance to the nearest of those before it.
    """
    sq = squared_norms(z)                                                # (n,)
    C = np.empty((k, z.shape[1]))
    near = np.full(len(sq), np.inf)                                      # (n,)
    i = rng.integers(len(sq))
    for j in range(k):
        C[j] = z[i:i + 1]
        near = np.minimum(near, squared_distances(z, sq, i))
        near[i] = 0                              # not what rounding leaves of it
        total = np.cumsum(near)                                          # (n,)
        i = np.searchsorted(total, rng.random() * total[-1], side="right")
        i = min(i, len(sq) - 1)                  # n where all that are left are duplicates
    return C


def assign(z, C):
    """The nearest centre of every row (n,), and the sum of the rows of each centre (k, D)."""
    half = 0.5 * (C * C).sum(1)                                          # (k,)
    sums = np.zeros(C.shape)
    nearest = []
    for x in chunks(z, len(C)):
        # |x - c|^2 is smallest where <x, c> - |c|^2 / 2 is largest.
        mine = (x @ C.T - half).argmax(1)                                # (rows,)
        # Rows of one centre stand together, so that one sum runs over each centre's.
        order = np.argsort(mine, kind="stable")
        used, start = np.unique(mine[order], return_index=True)
        sums[used] += np.add.reduceat(x[order], start)
        nearest.append(mine)
    return np.concatenate(nearest), sums
