"""Does every kernel travel? python -m experiments.cluster.kernels --platform=cuda (or tpu).

Compiles each public kernel of every family ahead of time for an accelerator that is not there, so that nothing that
only a CPU can run slips in: all algorithms of the contract tests (and their gradients, where they have checked ones),
one step of every loop there, and what those lists do not hold: sizes at which another kernel is chosen, decoding,
sampling, the dispatchers and the whole train step over eight devices. A new algorithm is one line in its family's
contracts.

Needs a compiler, see ``python -m experiments.cluster.compile --help``, and a checkout with its tests.
"""

import argparse
import functools
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cluster.aot import compile_train_step, shrunk
from experiments.cluster.models import find_model
from experiments.cluster.plan_report import print_table
from experiments.cluster.topology import standing_in, topology_devices

TOPOLOGY = {"cuda": "1x1x8", "tpu": "v5p:2x2x2"}  # eight devices each
FAMILIES = ("coupling", "reward_free", "pareto", "alignment", "lm", "moe")

# What a compiler refuses for no fault of the kernel: (platform, kernel) -> what is known of it.
KNOWN_FAULTS = {
    ("cuda", "reward_free.explore, plan, certificate"): (
        "XLA of jaxlib 0.10.2 finds no tiles for a product; XLA_FLAGS=--xla_gpu_enable_triton_gemm=false helps"
    ),
}


class Kernel(NamedTuple):
    """Something to compile.

    Attributes:
        name: family first.
        compile: ``compile(platform, devices)``; raises what the compiler raises.
    """

    name: str
    compile: Callable[[str, Sequence[Any]], Any]


class Outcome(NamedTuple):
    """What became of a kernel: seconds to trace, lower and compile, and the first line of the error, if any."""

    name: str
    platform: str
    seconds: float
    error: str

    @property
    def failed(self) -> bool:
        """Whether it did not compile, known faults of the compiler aside."""
        return bool(self.error) and (self.platform, self.name) not in KNOWN_FAULTS

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.error:
            return "compiled"
        return self.error if self.failed else f"known fault: {KNOWN_FAULTS[self.platform, self.name]}"


def on_one_device(name: str, function: Callable[..., Any], example: Callable[[Any], Any]) -> Kernel:
    """A kernel of one device: a function and what makes its arguments from a key; only their shapes are used."""

    def compile_it(_: str, devices: Sequence[Any]) -> None:
        place = jax.sharding.SingleDeviceSharding(devices[0])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(example, jax.random.key(0))
        )
        # Kernels written in Pallas ask for the kind of device, which newer versions of JAX read off the mesh.
        mesh = jax.sharding.Mesh(np.array(devices[:1]), ("one",))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(function).lower(*arguments)
        if "f64" in lowered.as_text():
            raise TypeError("asks for float64, which a TPU does not have")
        lowered.compile()

    return Kernel(name, compile_it)


def contract_items() -> Iterator[tuple[str, Callable[..., Any], Callable[[Any], Any]]]:
    """(name, function, example) of every line of the contract tests: functions, gradients, one step of each loop."""
    for family in FAMILIES:
        try:
            module = importlib.import_module(f"tests.{family}.{family}_contracts")
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name} is not here: run this in the root of a checkout with its tests.") from None
        for algorithm in module.ALGORITHMS:
            yield algorithm.name, algorithm.function, algorithm.example
            if algorithm.differentiable:
                yield f"{algorithm.name} gradient", _gradient(algorithm), algorithm.example
        for loop in getattr(module, "LOOPS", ()):
            yield f"{loop.name} one step", functools.partial(_one_step, loop), functools.partial(_state, loop)


def _gradient(algorithm: Any) -> Callable[..., Any]:
    def loss(*arguments: Any) -> Any:
        outputs = algorithm.function(*arguments)
        if algorithm.loss is not None:
            return algorithm.loss(outputs)
        leaves = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.sum(leaf) for leaf in leaves), start=jnp.zeros(()))

    return jax.grad(loss, argnums=algorithm.differentiable)


def _one_step(loop: Any, state: Any) -> Any:
    return loop.advance(state, 0, 1)


def _state(loop: Any, key: Any) -> tuple[Any]:
    return (loop.init(key),)


def all_kernels() -> list[Kernel]:
    """Everything that should travel."""
    from experiments.cluster.kernels_by_hand import distributed_kernels, kernels_by_hand

    on_one = [on_one_device(*item) for item in (*contract_items(), *kernels_by_hand())]
    steps = [Kernel(name, functools.partial(_compile_step, **options)) for name, options in train_steps().items()]
    return [*on_one, *[Kernel(*item) for item in distributed_kernels()], *steps]


def train_steps() -> dict[str, dict[str, Any]]:
    """Train steps over eight devices that between them hold every dispatcher, schedule, sharding and context kernel."""
    return {
        "moe.train_step[drop_pad, 1f1b, zero1]": {
            "folding": "attention=tp2 experts=ep4 pipeline=2",
            "options": {"dispatch": "drop_pad", "capacity_factor": 1.0, "schedule": "1f1b", "sharding": "zero1"},
        },
        "moe.train_step[padded, circular, all-gather context]": {
            "folding": "attention=cp2 experts=ep4 pipeline=2",
            "options": {"dispatch": "padded", "schedule": "gpipe", "virtual_stages": 2, "remat": "experts"},
        },
        "moe.train_step[ragged, ring context]": {
            "folding": "attention=tp2.cp2 experts=ep8",
            "options": {"dispatch": "ragged", "context": "ring"},
        },
        "moe.train_step[allgather, fsdp, etp]": {
            "folding": "attention=tp2 experts=etp2.ep2",
            "options": {"dispatch": "allgather", "sharding": "fsdp", "remat": "full", "balance": "batch"},
        },
    }


def _compile_step(platform: str, devices: Sequence[Any], *, folding: str, options: dict[str, Any]) -> None:
    from jaxrl_suite.moe.config import MoEConfig
    from jaxrl_suite.moe.folding import Folding

    layout = Folding.parse(folding, 8)
    model = shrunk(find_model("qwen2-57b-a14b"), layout).replace(num_layers=4, num_experts=8, experts_per_token=2)
    model = model.replace(param_dtype="float32", compute_dtype="bfloat16")
    config = MoEConfig(model=model, num_microbatches=2, **options)
    compile_train_step(config, layout, devices[:8], sequence=256, global_batch=2 * layout.dp, platform=platform)


def compile_kernel(kernel: Kernel, platform: str, devices: Sequence[Any]) -> Outcome:
    """Compiles one; a warning that float64 was asked for and refused is an error too."""
    began = time.perf_counter()
    error = ""
    with standing_in(list(devices)), warnings.catch_warnings(), jax.enable_x64(False):
        warnings.filterwarnings("error", message=".*requested dtype.*float64")
        try:
            kernel.compile(platform, devices)
        except Exception as problem:  # whatever the tracer, the lowering or the plugin raises is the result
            lines = [line for line in str(problem).splitlines() if line.strip()]
            error = f"{type(problem).__name__}: {lines[0] if lines else ''}"[:200]
    return Outcome(kernel.name, platform, time.perf_counter() - began, error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles what is asked for; returns 0 if all of it compiled, 1 if not, 2 for input that cannot be."""
    options = _parser().parse_args(arguments)
    try:
        devices = topology_devices(options.platform, TOPOLOGY.get(options.platform, ""))
        kernels = [kernel for kernel in all_kernels() if _wanted(kernel.name, options.only)][
            options.part :: options.parts
        ]
    except (ValueError, ImportError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if not kernels:
        print(f"error: --only={options.only}: is in no kernel's name.", file=sys.stderr)
        return 2
    outcomes = []
    for kernel in kernels:
        outcome = compile_kernel(kernel, options.platform, devices)
        outcomes.append(outcome)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome._asdict()) + "\n")
        print(f"{outcome.seconds:6.1f} s  {outcome.name}  {outcome.verdict}", flush=True)
    _print_summary(outcomes)
    return int(any(outcome.failed for outcome in outcomes))


def _wanted(name: str, words: str) -> bool:
    return any(word in name for word in words.split(","))


def _print_summary(outcomes: Sequence[Outcome]) -> None:
    rows = []
    for family in dict.fromkeys(outcome.name.split(".")[0] for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.name.split(".")[0] == family]
        seconds = np.array([outcome.seconds for outcome in mine])
        good = sum(not outcome.error for outcome in mine)
        rows.append([family, f"{good} of {len(mine)}", f"{seconds.sum():.0f}", f"{seconds.max():.1f}"])
    print()
    print_table(rows, ("family", "compiled", "seconds", "longest"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cluster.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--platform", default="cuda", help="cuda (H100) or tpu (default cuda)")
    add("--only", default="", help="only kernels with this (or one of these, comma-separated) in their name")
    add("--part", type=int, default=0, help="with --parts: which share, from 0")
    add("--parts", type=int, default=1, help="compile every PARTS-th kernel only")
    add("--out", type=Path, help="append a JSON line for each kernel to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
