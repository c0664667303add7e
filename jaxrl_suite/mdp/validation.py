"""Says what is wrong with a linear mixture: which row of which kernel, and whether its features are normalised."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxrl_suite.config import check
from jaxrl_suite.mdp.mixture import LinearMixtureMDP, feature_bound

_SHOWN = 5  # rows that a text names


class RowFault(NamedTuple):
    """A row that is not a distribution.

    Attributes:
        kernel: "theta" or "nominal" for the mixtures, or the index of a base kernel.
        state: of the row.
        action: of the row.
        total: what its entries sum to.
        smallest: its smallest entry.
    """

    kernel: str | int
    state: int
    action: int
    total: float
    smallest: float

    def __str__(self) -> str:
        name = self.kernel if isinstance(self.kernel, str) else f"base kernel {self.kernel}"
        return f"{name}[{self.state}, {self.action}] sums to {self.total:.6g}, smallest entry {self.smallest:.6g}"


class MixtureReport(NamedTuple):
    """What :func:`validate_mixture` found.

    Attributes:
        faults: rows of the mixtures (true and nominal parameter) that are not distributions; none in a valid world.
        base_faults: rows of base kernels that are not distributions; allowed, since base measures may be signed, but
            in a world of ordinary kernels this is where an error of the mixture comes from.
        feature_norm: largest ``|phi_f(s, a)|`` over f into [0, 1] (an upper bound for lists of more than 12).
        normalised: whether that is at most 1, as the theory asks; ``from_tables`` and ``linear_mixture`` divide by it.
        valid: whether there are no faults and every number is finite.
    """

    faults: tuple[RowFault, ...]
    base_faults: tuple[RowFault, ...]
    feature_norm: float
    normalised: bool
    valid: bool

    def __str__(self) -> str:
        lines = ["valid: every row of the mixture is a distribution"] if self.valid else ["not a kernel:"]
        lines += [f"  {fault}" for fault in self.faults[:_SHOWN]]
        if len(self.faults) > _SHOWN:
            lines.append(f"  ... and {len(self.faults) - _SHOWN} more rows")
        if self.base_faults:
            lines.append(f"{len(self.base_faults)} rows of base kernels are no distributions (signed measures may be):")
            lines += [f"  {fault}" for fault in self.base_faults[:_SHOWN]]
        word = "normalised" if self.normalised else "not normalised, divide by it"
        lines.append(f"largest |phi_f| = {self.feature_norm:.6g}: {word}")
        return "\n".join(lines)


def validate_mixture(
    world: LinearMixtureMDP | ArrayLike,
    theta: ArrayLike | None = None,
    *,
    nominal: ArrayLike | None = None,
    tolerance: float | None = None,
) -> MixtureReport:
    """Checks a world, or dense base kernels before a world is made of them. Concrete arrays only; raises nothing else.

    Args:
        world: the world, or base kernels [D, S, A, S].
        theta: [D], weights of the kernels; not for a world, which has its own.
        nominal: [D], weights known to be valid, checked too if given.
        tolerance: largest error of a row sum and of a negative entry; by dtype if None.

    Returns:
        The report; ``print`` it.

    Raises:
        ValueError: a shape does not fit, or ``theta`` is missing or superfluous.

    >>> kernels = np.zeros((2, 2, 1, 2))
    >>> kernels[:, :, 0, 0] = 1.0
    >>> kernels[1, 1, 0, 0] = 0.5
    >>> print(validate_mixture(kernels, [0.5, 0.5]))
    not a kernel:
      theta[1, 0] sums to 0.75, smallest entry 0
    1 rows of base kernels are no distributions (signed measures may be):
      base kernel 1[1, 0] sums to 0.5, smallest entry 0
    largest |phi_f| = 1.41421: not normalised, divide by it
    """
    if isinstance(world, LinearMixtureMDP):
        check(theta is None, argument="theta", value=theta, rule="a world has its own")
        features = np.asarray(world.features)
        parameters = {"theta": np.asarray(world.theta), "nominal": np.asarray(world.nominal)}
    else:
        kernels = np.asarray(world)
        check(
            kernels.ndim == 4 and kernels.shape[1] == kernels.shape[3] and kernels.size > 0,
            argument="kernels",
            value=kernels.shape,
            rule="shape must be [D, S, A, S], none of them 0",
        )
        check(theta is not None, argument="theta", value=theta, rule="is needed with kernels given as an array")
        features, parameters = np.moveaxis(kernels, 0, -1), {"theta": np.asarray(theta)}
        if nominal is not None:
            parameters["nominal"] = np.asarray(nominal)
    dimension = features.shape[-1]
    for name, parameter in parameters.items():
        check(
            parameter.shape == (dimension,), argument=name, value=parameter.shape, rule=f"must be [D] = [{dimension}]"
        )
    if tolerance is None:
        tolerance = 1e-4 if features.dtype.itemsize < 8 else 1e-8
    faults = [f for name, parameter in parameters.items() for f in row_faults(features @ parameter, name, tolerance)]
    # A world's features carry a common factor: only the ratio of a base row's entries to it can be judged.
    scale = 1.0 if not isinstance(world, LinearMixtureMDP) else max(float(np.max(features.sum(2))), 1e-300)
    base = [f for i in range(dimension) for f in row_faults(features[..., i] / scale, i, tolerance)]
    norm = feature_bound(features)
    finite = bool(np.all(np.isfinite(features)))
    return MixtureReport(tuple(faults), tuple(base), norm, norm <= 1 + tolerance, finite and not faults)


def row_faults(rows: np.ndarray, name: str | int, tolerance: float) -> list[RowFault]:
    """The rows of ``[S, A, N]`` that are not distributions."""
    total, smallest = rows.sum(-1), rows.min(-1)
    bad = ~(np.isfinite(total) & (smallest >= -tolerance) & (np.abs(total - 1) <= tolerance))
    return [RowFault(name, int(s), int(a), float(total[s, a]), float(smallest[s, a])) for s, a in np.argwhere(bad)]
