"""Worlds that are linear mixtures of known kernels with unknown weights, for explorers that estimate the weights.

Each function returns a :class:`jaxrl_suite.mdp.LinearMixtureMDP`. Exploration matters where some weight shows itself
only in states that are hard to reach: the lock and the worlds with a weight a region. Random mixtures and plain
RiverSwim, where every transition tells of every weight, are negative controls.
"""

from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check, check_count, check_key
from jaxrl_suite.mdp import LinearMixtureMDP, linear_mixture, validate_mixture
from jaxrl_suite.types import PRNGKey


def from_kernels(
    kernels: np.ndarray,
    theta: np.ndarray,
    *,
    start: int = 0,
    nominal: np.ndarray | None = None,
    normalise: bool = True,
) -> LinearMixtureMDP:
    """A mixture of D dense kernels, ``P = sum_i theta_i kernels[i]``, stored by lists of possible successors.

    Args:
        kernels: [D, S, A, S], base kernels; they may be signed as long as the mixture is a kernel.
        theta: [D], true weights.
        start: first state.
        nominal: [D], weights known to be valid; uniform if None.
        normalise: see :func:`jaxrl_suite.mdp.linear_mixture`.

    Returns:
        The world.

    Raises:
        ValueError: a shape does not fit, or the mixture has a row that is not a distribution (it is named).
    """
    kernels = np.asarray(kernels)
    check(
        kernels.ndim == 4 and kernels.shape[1] == kernels.shape[3] and kernels.size > 0,
        argument="kernels",
        value=kernels.shape,
        rule="shape must be [D, S, A, S], none of them 0",
    )
    used = np.any(kernels != 0, axis=0)
    width = int(used.sum(-1).max())
    # A stable sort by "unused" puts the successors first, in order; the padding has features 0.
    successors = np.argsort(~used, axis=-1, kind="stable")[..., :width]
    features = np.take_along_axis(kernels, successors[None], axis=-1)
    try:
        return linear_mixture(
            np.moveaxis(features, 0, -1), successors, theta, start=start, nominal=nominal, normalise=normalise
        )
    except ValueError as error:
        if np.shape(theta) != kernels.shape[:1] or "is not a distribution" not in str(error):
            raise
        base = validate_mixture(kernels, theta).base_faults
        hint = f" Base kernels that are not distributions: {'; '.join(map(str, base[:3]))}." if base else ""
        raise ValueError(f"{error}{hint}") from None


def from_tables(
    tables: np.ndarray | str | Path, theta: np.ndarray | None = None, *, start: int = 0
) -> LinearMixtureMDP:
    """A user's own world: kernels as an array, or an ``.npz`` with ``kernels`` and ``theta`` (``start``, ``nominal``).

    Args:
        tables: [D, S, A, S], or the path of the file.
        theta: [D]; read from the file if None.
        start: first state, unless the file says otherwise.

    Returns:
        The world, features normalised.

    Raises:
        ValueError: a name is missing in the file, or a row of the mixture is not a distribution (it is named).
    """
    nominal = None
    if isinstance(tables, str | Path):
        arrays = _read_tables(tables)
        tables, theta = arrays["kernels"], arrays["theta"] if theta is None else theta
        start, nominal = int(arrays.get("start", start)), arrays.get("nominal")
    check(theta is not None, argument="theta", value=theta, rule="is needed with kernels given as an array")
    return from_kernels(cast(np.ndarray, tables), cast(np.ndarray, theta), start=start, nominal=nominal)


def _read_tables(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``, none of them pickled."""
    try:
        stored = np.load(path)
        arrays = {name: stored[name] for name in stored.files}
        stored.close()
    except (ValueError, AttributeError) as error:  # not a zip of arrays: np.load tries to unpickle, or gives one array
        raise ValueError(
            f"tables={str(path)!r}: must be an .npz of number arrays ({error}). "
            "Remedy: numpy.savez(path, kernels=kernels, theta=theta)."
        ) from None
    missing = [name for name in ("kernels", "theta") if name not in arrays]
    check(not missing, argument="tables", value=str(path), rule=f"the file lacks {missing}")
    return arrays


def lock(
    num_states: int = 8, num_actions: int = 3, num_rooms: int = 4, *, stall: tuple[float, ...] | None = None
) -> LinearMixtureMDP:
    """Combination lock: in each state one action advances, the others lead back to state 0.

    The right action of state s is ``(3 s + 1) mod A``. It advances with probability ``1 - p_room`` and stalls
    otherwise; rooms are equal stretches of states, each with a stall probability of its own. D = 1 + rooms: features
    are signed, ``theta = (1, p_1, ...)``.

    Args:
        num_states: S.
        num_actions: A.
        num_rooms: rooms.
        stall: p of each room; from 0.1 to 0.4 in equal steps if None.

    Returns:
        The world; its nominal stall probabilities are 1/2.
    """
    return _stretches(num_states, num_actions, num_rooms, stall, reset=True)


def region_chain(
    num_states: int = 8, num_regions: int = 4, *, stall: tuple[float, ...] | None = None
) -> LinearMixtureMDP:
    """As :func:`lock` with two actions, and a wrong action steps back by one state instead of to state 0."""
    return _stretches(num_states, 2, num_regions, stall, reset=False)


def _stretches(
    num_states: int, num_actions: int, num_rooms: int, stall: tuple[float, ...] | None, *, reset: bool
) -> LinearMixtureMDP:
    check_count(2, num_states=num_states, num_actions=num_actions)
    check_count(1, most=num_states - 1, num_rooms=num_rooms)
    stall = tuple(np.linspace(0.1, 0.4, num_rooms)) if stall is None else stall
    check(len(stall) == num_rooms, argument="stall", value=stall, rule=f"must have one entry a room, {num_rooms}")
    kernels = np.zeros((1 + num_rooms, num_states, num_actions, num_states))
    for state in range(num_states):
        ahead, back = min(state + 1, num_states - 1), 0 if reset else max(state - 1, 0)
        kernels[0, state, :, back] = 1.0
        right = (3 * state + 1) % num_actions
        kernels[:, state, right] = 0.0
        kernels[0, state, right, ahead] = 1.0
        if ahead != state:
            room = 1 + min(state * num_rooms // (num_states - 1), num_rooms - 1)
            kernels[room, state, right, ahead] = -1.0
            kernels[room, state, right, state] = 1.0
    theta, nominal = np.array([1.0, *stall]), np.array([1.0] + [0.5] * num_rooms)
    return from_kernels(kernels, theta, nominal=nominal)


def hard_instance(
    dimension: int = 5, *, gap: float = 0.02, success: float = 1 / 6, signs: tuple[int, ...] | None = None
) -> LinearMixtureMDP:
    """The lower-bound instance: which of 2^(D-1) actions is best hides in D - 1 tiny signs.

    States: start, failure, success (both absorbing). Action a in {-1, +1}^(D-1) succeeds with probability
    ``success + <mu, a>``, mu in {-gap, +gap}^(D-1). With reward 1/H a step in the last state the best value is
    ``(H - 1) / H (success + (D - 1) gap)``, and a policy with w wrong signs loses ``2 gap w (H - 1) / H``.

    Args:
        dimension: D, at least 2.
        gap: Delta; tie it to 1 / sqrt(K) for the minimax slope.
        success: delta_0 of the paper (not the confidence level).
        signs: of mu; alternating if None.

    Returns:
        The world, with the paper's own normalisation.

    References:
        Zhang, Zhang, Gu, 2023, arXiv 2303.10165, lower bound; Zhou, Gu, 2022, arXiv 2205.11507.
    """
    check_count(2, dimension=dimension)
    bits = dimension - 1
    check(0 < bits * gap <= success, argument="gap", value=gap, rule=f"(D - 1) gap must be in (0, {success:.4g}]")
    signs = tuple((-1) ** i for i in range(bits)) if signs is None else signs
    spread = gap * bits
    p, q = (1 + spread) ** -0.5, (gap / (1 + spread)) ** 0.5
    actions = 2.0 * ((np.arange(2**bits)[:, None] >> np.arange(bits)) & 1) - 1.0
    features = np.zeros((3, 2**bits, 2, dimension))
    successors = np.zeros((3, 2**bits, 2), int)
    features[0, :, 0] = np.concatenate([np.full((2**bits, 1), p * (1 - success)), -q * actions], axis=1)
    features[0, :, 1] = np.concatenate([np.full((2**bits, 1), p * success), q * actions], axis=1)
    successors[0] = (1, 2)
    for state in (1, 2):
        features[state, :, 0, 0] = p
        successors[state] = state
    theta = np.array([1 / p, *(gap / q * np.array(signs))])
    nominal = np.array([1 / p] + [0.0] * bits)
    known = {"norm_bound": 1 + spread, "center_bound": gap / q * bits**0.5}
    return linear_mixture(features, successors, theta, nominal=nominal, normalise=False, **known)


def riverswim(
    num_states: int = 6, *, current: tuple[float, float, float] = (0.35, 0.6, 0.05), num_regions: int | None = None
) -> LinearMixtureMDP:
    """RiverSwim: action 0 drifts left for certain, action 1 swims right against the current.

    Swimming moves right, stays, or slips left with weights theta = (p_right, p_stay, p_left); the banks merge what
    would leave the river. With ``num_regions`` the weights are those of each stretch of the river, D = 1 + 2 regions,
    and must be learnt where they hold; the current grows stronger downstream.

    Args:
        num_states: S.
        current: (p_right, p_stay, p_left), sums to 1.
        num_regions: None for one set of weights shared by all states (D = 3).

    Returns:
        The world.
    """
    check_count(2, num_states=num_states)
    check(abs(sum(current) - 1) < 1e-9, argument="current", value=current, rule="must sum to 1")
    if num_regions is not None:
        check_count(1, most=num_states, num_regions=num_regions)
    right, _, left = current
    shared = num_regions is None
    regions = 1 if shared else num_regions
    kernels = np.zeros((3 if shared else 1 + 2 * regions, num_states, 2, num_states))
    for state in range(num_states):
        ahead, back = min(state + 1, num_states - 1), max(state - 1, 0)
        if shared:
            kernels[:, state, 0, back] = 1.0
            for index, following in enumerate((ahead, state, back)):
                kernels[index, state, 1, following] += 1.0
            continue
        region = state * regions // num_states
        kernels[0, state, 0, back] = 1.0
        kernels[0, state, 1, state] += 1.0  # stays, but for what the weights of the region move
        for index, following in ((1 + 2 * region, ahead), (2 + 2 * region, back)):
            kernels[index, state, 1, following] += 1.0
            kernels[index, state, 1, state] -= 1.0
    if shared:
        return from_kernels(kernels, np.array(current))
    strengths = [(right * (1 - 0.5 * i / regions), left * (1 + i / regions)) for i in range(regions)]
    theta = np.array([1.0, *(value for pair in strengths for value in pair)])
    return from_kernels(kernels, theta, nominal=np.array([1.0] + [1 / 3] * (2 * regions)))


def random_mixture(
    key: PRNGKey, num_states: int = 8, num_actions: int = 3, dimension: int = 5, *, concentration: float = 0.3
) -> LinearMixtureMDP:
    """A mixture of D Dirichlet kernels with Dirichlet weights: mixes fast, a negative control.

    Args:
        key: consumed.
        num_states: S.
        num_actions: A.
        dimension: D.
        concentration: of the rows; small rows are nearly deterministic.

    Returns:
        The world.
    """
    check_key(key)
    check_count(1, num_states=num_states, num_actions=num_actions, dimension=dimension)
    kernel_key, theta_key = jax.random.split(key)
    alpha = jnp.full(num_states, concentration)
    kernels = np.asarray(jax.random.dirichlet(kernel_key, alpha, (dimension, num_states, num_actions)), np.float64)
    theta = np.asarray(jax.random.dirichlet(theta_key, jnp.ones(dimension)), np.float64)
    return from_kernels(kernels / kernels.sum(-1, keepdims=True), theta / theta.sum())


def double_chain(length: int = 5, *, slip: float = 0.1) -> LinearMixtureMDP:
    """Two chains joined in the middle, where one starts: D = 2 kernels, move as intended or the other way.

    Args:
        length: states on each side of the start; S = 2 length + 1.
        slip: weight of the wrong way.

    Returns:
        The world; coverage of its ends tells explorers apart.
    """
    check_count(1, length=length)
    states = 2 * length + 1
    kernels = np.zeros((2, states, 2, states))
    for state in range(states):
        sides = (max(state - 1, 0), min(state + 1, states - 1))
        for action in (0, 1):
            kernels[0, state, action, sides[action]] = 1.0
            kernels[1, state, action, sides[1 - action]] = 1.0
    return from_kernels(kernels, np.array([1 - slip, slip]), start=length)


def tabular_onehot(kernel: np.ndarray, *, start: int = 0) -> LinearMixtureMDP:
    """The tabular limit: a feature for each (s, a, s'), D = S^2 A, theta the kernel itself. Keep S at most 5.

    Args:
        kernel: [S, A, S].
        start: first state.

    Returns:
        The world; its nominal kernel is uniform.
    """
    kernel = np.asarray(kernel)
    states, actions, _ = kernel.shape
    features = np.eye(kernel.size).reshape(states, actions, states, kernel.size)
    successors = np.broadcast_to(np.arange(states), kernel.shape)
    return linear_mixture(
        features, successors, kernel.ravel(), start=start, nominal=np.full(kernel.size, 1 / states), normalise=False
    )


_MOVES = ((0, 0), (-1, 0), (1, 0), (0, 1), (0, -1))  # none, north, south, east, west


def gridworld(
    layout: tuple[str, ...] = ("S....", ".....", ".....", "....."),
    *,
    wind: tuple[float, ...] = (0.7, 0.05, 0.1, 0.05, 0.1),
    rooms: bool = False,
) -> LinearMixtureMDP:
    """A grid whose moves the wind may take over: kernels (as intended, N, S, E, W) mixed by the strength of each wind.

    Actions 0..3 move north, south, east, west; walls (``#``) and edges stop a move. With ``rooms`` each letter of the
    layout (``a``, ``b``, ...) is a room with winds of its own, which have to be learnt inside it: then the strengths of
    room i are those of ``wind`` turned by i quarters.

    Args:
        layout: rows of equal length: ``S`` start, ``#`` wall, any other character floor (or its room).
        wind: weights (as intended, N, S, E, W), sum to 1.
        rooms: weights a room, D = 1 + 4 rooms, instead of D = 5.

    Returns:
        The world; states are cells row by row, walls included (they are never entered).
    """
    check(abs(sum(wind) - 1) < 1e-9 and len(wind) == 5, argument="wind", value=wind, rule="must be 5 weights of sum 1")
    rows, columns = len(layout), len(layout[0])
    cells = "".join(layout)
    check(len(cells) == rows * columns and {*map(len, layout)} == {columns}, argument="layout", value=layout,
          rule="rows must have equal length")  # fmt: skip
    check("S" in cells, argument="layout", value=layout, rule="needs a start S")
    letters = sorted(set(cells) - set("S#.")) or ["."]
    blocks = len(letters) if rooms else 1
    kernels = np.zeros((1 + 4 * blocks if rooms else 5, rows * columns, 4, rows * columns))

    def after(cell: int, move: tuple[int, int]) -> int:
        row, column = divmod(cell, columns)
        row, column = row + move[0], column + move[1]
        inside = 0 <= row < rows and 0 <= column < columns
        return row * columns + column if inside and layout[row][column] != "#" else cell

    for cell, letter in enumerate(cells):
        block = letters.index(letter) if rooms and letter in letters else 0
        for action in range(4):
            intended = after(cell, _MOVES[1 + action])
            kernels[0, cell, action, intended] += 1.0
            for index in range(1, 5):
                column = 4 * block + index
                kernels[column, cell, action, after(cell, _MOVES[index])] += 1.0
                if rooms:
                    kernels[column, cell, action, intended] -= 1.0
    start = cells.index("S")
    if not rooms:
        return from_kernels(kernels, np.array(wind), start=start)
    strengths = np.concatenate([np.roll(wind[1:], i) for i in range(blocks)])
    return from_kernels(
        kernels, np.array([1.0, *strengths]), start=start, nominal=np.array([1.0] + [0.125] * 4 * blocks)
    )
