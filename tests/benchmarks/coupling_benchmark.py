"""Speed and quality of the coupling family beside its two NumPy and Python oracles, in one run.

    python tests/benchmarks/coupling_benchmark.py            # everything
    python tests/benchmarks/coupling_benchmark.py pairs ebim # some parts

Parts: pairs, ebim, derivative, game, search, polish. Times are medians, compilation excluded, by the wall clock and of
the processor; read the second on a busy machine. Oracle (a) is a heapq greedy, (b) a NumPy argmax loop.
"""

import statistics
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.coupling import certified_coupling, ebim_greedy, greedy_coupling, mecb
from jaxrl_suite.coupling.games import CodingGame, play
from jaxrl_suite.envs.rate_grid import RateGridConfig, next_state, rate_grid, soft_policy
from tests.reference.coupling_exact import exact_entropies
from tests.reference.coupling_game import play_episode
from tests.reference.coupling_greedy import argmax_greedy, entropy, heap_greedy


class Seconds(NamedTuple):
    """Medians of wall-clock time and of processor time; on a busy machine only the second says something.

    Attributes:
        wall: seconds.
        processor: seconds of all threads: for one-threaded oracles the wall-clock time of a quiet machine, for ours
            at least that.
    """

    wall: float
    processor: float

    def __truediv__(self, number):
        return Seconds(self.wall / number, self.processor / number)

    def over(self, other):
        """Ratios in words."""
        return f"{self.wall / other.wall:.1f}x ({self.processor / other.processor:.1f}x of processor time)"


def timed(function, *arguments):
    began = time.perf_counter(), time.process_time()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began[0], time.process_time() - began[1]


def medians(times):
    return Seconds(*(statistics.median(column) for column in zip(*times)))


def median_seconds(function, *arguments, repeats=7):
    jax.block_until_ready(function(*arguments))
    return medians([timed(function, *arguments) for _ in range(repeats)]).wall


def every(function, pairs):
    for p, q in pairs:
        function(p, q)


def pairs():
    """Time a pair in a batch against both oracles, in turns; entropies compared in float64 in a second pass."""
    rng = np.random.default_rng(0)
    couple = jax.jit(jax.vmap(greedy_coupling))
    for n, m, batch in ((512, 4, 256), (64, 64, 256), (4096, 4096, 4)):
        p, q = rng.dirichlet(np.ones(n), size=batch), rng.dirichlet(np.ones(m), size=batch)
        arrays = jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)
        some = list(zip(p, q))[: max(2, 2048 // (n + m))]  # several, so that the oracles run warm
        jax.block_until_ready(couple(*arrays))
        times = {"ours": [], "heapq": [], "argmax": []}
        for turn in range(25):
            times["ours"].append(timed(couple, *arrays))
            times["heapq"].append(timed(every, heap_greedy, some))
            if turn < 5:
                times["argmax"].append(timed(every, argmax_greedy, some))
        best = [min(row[0] for row in rows) for rows in times.values()]
        best = [seconds / count for seconds, count in zip(best, (batch, len(some), len(some)))]
        ours, heap, loop = (medians(rows) / count for rows, count in zip(times.values(), (batch, len(some), len(some))))
        with jax.enable_x64(True):
            found = np.asarray(jax.jit(jax.vmap(greedy_coupling))(jnp.asarray(p), jnp.asarray(q)).entropy)
        error = max(abs(entropy([c[2] for c in heap_greedy(a, b)]) - e) for (a, b), e in zip(zip(p, q), found))
        print(
            f"({n}, {m}) batch {batch}: {ours.wall * 1e6:.1f} us a pair, {ours.processor * 1e6:.1f} of processor time; "
            f"heapq {heap.processor * 1e6:.0f} us, {heap.over(ours)}; "
            f"argmax {loop.processor * 1e6:.0f} us, {loop.over(ours)}; fastest turns {best[0] * 1e6:.1f}, "
            f"{best[1] * 1e6:.0f} and {best[2] * 1e6:.0f} us, {best[1] / best[0]:.1f}x and {best[2] / best[0]:.0f}x; "
            f"largest difference in float64 {error:.1e} bit"
        )


def ebim():
    p = jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(65536)), jnp.float32)
    encode = jax.jit(ebim_greedy)
    seconds = median_seconds(encode, p, 8.0)
    print(
        f"ebim_greedy at 65,536 symbols: {seconds * 1e3:.2f} ms, H(T) = {float(encode(p, 8.0).entropy):.6f} at rate 8"
    )


def derivative():
    rng = np.random.default_rng(2)
    for n, m, batch in ((512, 4, 256), (64, 64, 256), (4096, 4096, 4)):
        p, q = (jnp.asarray(rng.dirichlet(np.ones(k), size=batch), jnp.float32) for k in (n, m))

        def value(p, q):
            return greedy_coupling(p, q).entropy

        forward = jax.jit(jax.vmap(value)).lower(p, q).compile()
        both = jax.jit(jax.vmap(jax.value_and_grad(value, argnums=(0, 1)))).lower(p, q).compile()
        seconds = median_seconds(forward, p, q), median_seconds(both, p, q)
        extra = both.memory_analysis().temp_size_in_bytes / batch / (n + m)
        print(
            f"value and gradient of H at ({n}, {m}) batch {batch}: {seconds[1] / batch * 1e6:.1f} us a pair, "
            f"{seconds[1] / seconds[0]:.2f}x the value; {extra:.0f} bytes of scratch a symbol and pair"
        )


def game(num_episodes=10_000, num_messages=512, rate=3.0, horizon=100, log_beta=-4.5):
    grid = rate_grid(RateGridConfig())
    policy = soft_policy(grid, float(np.exp(log_beta)))

    def move(key, state, action):
        return next_state(key, grid, state, action)

    world = CodingGame(policy, move, grid.entry_reward, grid.terminal, grid.start)
    messages = jax.random.randint(jax.random.key(0), (num_episodes,), 0, num_messages)

    def run(key):
        return play(key, world, messages, rate, num_messages=num_messages, horizon=horizon, num_lanes=512)

    episodes = jax.block_until_ready(run(jax.random.key(2)))
    ours = Seconds(*timed(run, jax.random.key(2))) / num_episodes
    lengths = np.asarray(episodes.trajectories.lengths)
    accuracy = float((episodes.decoded == messages).mean())
    taken = f"{ours.wall * 1e3:.3f} ms, {ours.processor * 1e3:.3f} of processor time, an episode"
    print(
        f"8x8 game, {num_episodes} episodes, {num_messages} messages, rate {rate}, log beta {log_beta}: "
        f"{taken} of {lengths.mean():.1f} steps (horizon {horizon}), "
        f"masked steps {float(episodes.masked):.1%}, accuracy {accuracy:.3f}, "
        f"reward {float(episodes.rewards.mean()):.3f}"
    )
    arrays = [np.asarray(x, float) for x in (policy, grid.entry_reward)]
    for name, oracle, count in (("heapq", heap_greedy, 60), ("argmax", argmax_greedy, 20)):
        rng = np.random.default_rng(3)
        began, steps, right = (time.perf_counter(), time.process_time()), 0, 0
        for episode in range(count):
            message = int(messages[episode])
            decoded, _, length, _ = play_episode(
                rng, arrays[0], np.asarray(grid.mdp.successors), np.asarray(grid.mdp.transition, float), arrays[1],
                np.asarray(grid.terminal), int(grid.start), message, num_messages, rate, horizon, oracle,
            )  # fmt: skip
            steps, right = steps + length, right + (decoded == message)
        spent = Seconds(time.perf_counter() - began[0], time.process_time() - began[1])
        per_episode = spent / (steps / lengths.mean())
        print(
            f"  NumPy with {name}: {per_episode.processor * 1e3:.2f} ms an episode of equal length, "
            f"{per_episode.over(ours)}; "
            f"accuracy {right / count:.2f} of {count}"
        )


def search():
    """180 cases at N = 7 (45 for each alphabet of Y of 2..5 symbols), rates uniform in [0.3, 2.5]; then N = 64."""
    rng = np.random.default_rng(4)
    found = {name: [] for name in ("paper", "decoder_aware", "exact")}
    with jax.enable_x64(True):
        for m in (2, 3, 4, 5):
            p_x, p_y = rng.dirichlet(np.ones(7), size=45), rng.dirichlet(np.ones(m), size=45)
            rates = rng.uniform(0.3, 2.5, size=45)
            for name, values in found.items():
                solve = jax.jit(jax.vmap(lambda x, y, r, s=name: mecb(x, y, r, search=s).information))
                values.append(np.asarray(solve(p_x, p_y, rates)))
        paper, aware, exact = (np.concatenate(found[name]).mean() for name in found)
        print(
            f"bottleneck at N = 7, 180 cases, mean I(X;Y): paper {paper:.4f}, decoder-aware {aware:.4f}, "
            f"exact {exact:.4f} bit; gap closed {(aware - paper) / (exact - paper):.1%}"
        )
    p_x, p_y = rng.dirichlet(np.ones(64), size=4), rng.dirichlet(np.ones(8), size=4)
    rates, values = np.array([1.0, 1.5, 2.0, 2.5]), {}
    for name in ("paper", "decoder_aware"):
        solve = jax.jit(lambda x, y, r, s=name: mecb(x, y, r, search=s))
        began = time.perf_counter()
        results = [solve(*map(jnp.float32, case)) for case in zip(p_x, p_y, rates)]
        values[name] = np.mean([float(b.information) for b in results])
        upper = np.mean([float(b.upper) for b in results])
        seconds = time.perf_counter() - began
        print(f"N = 64, M = 8, 4 cases: {name} {values[name]:.4f} bit of at most {upper:.4f}, {seconds:.1f} s")


def polish():
    rng = np.random.default_rng(5)
    p, q = np.zeros((1000, 4)), np.zeros((1000, 4))
    for row in range(1000):
        n, m = rng.integers(2, 5, size=2)
        p[row, :n], q[row, :m] = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    with jax.enable_x64(True):
        optimum = exact_entropies(p, q)
        for name, rule, polished in (("max", "max", False), ("best", "best", False), ("best, polished", "best", True)):
            solve = jax.jit(jax.vmap(lambda p, q, r=rule, d=polished: certified_coupling(p, q, rule=r, polish=d)))
            excess = np.asarray(solve(p, q).entropy) - optimum
            print(
                f"{name}: 1,000 pairs of 2-4 states, mean excess {excess.mean():.5f} bit, largest {excess.max():.3f}, "
                f"optimal {np.mean(excess < 1e-9):.1%}"
            )
        p, q = rng.dirichlet(np.ones(64), size=1000), rng.dirichlet(np.ones(64), size=1000)
        solve = jax.jit(jax.vmap(certified_coupling))
        gap = np.asarray(solve(p, q).gap)
        text = "best: 1,000 pairs of 64 states, gap to the majorize-profile bound"
        print(f"{text}: mean {gap.mean():.4f}, largest {gap.max():.4f} bit")


PARTS = {f.__name__: f for f in (pairs, ebim, derivative, game, search, polish)}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
