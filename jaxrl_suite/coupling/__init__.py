"""Minimum entropy coupling, and the bottleneck in front of it.

A *coupling* of two laws p and q is a joint law with these marginals; the one of least joint entropy makes one variable
say as much as possible about the other. Everything here is a pure function of arrays for one instance, under jit, vmap
and grad; rates, entropies and information are in bits; symbols of mass zero are absent, so padding is a mask.

Couplings      :func:`greedy_coupling` with a derivative that stores only its path, :class:`SparseCoupling`.
Bounds         :func:`coupling_bounds`, four lower bounds on the joint entropy of every coupling.
Bottleneck     :func:`ebim_greedy`, :func:`ebim_path`: the most informative code of a source at a bounded code entropy.

References:
    Ebrahimi, Chen, Khisti, Minimum Entropy Coupling with Bottleneck, 2024, arXiv 2410.21666.
"""

from jaxrl_suite.coupling.bounds import CouplingBounds, coupling_bounds, coupling_bounds_multi
from jaxrl_suite.coupling.ebim import EbimPath, Encoder, ebim_greedy, ebim_path
from jaxrl_suite.coupling.greedy import greedy_coupling
from jaxrl_suite.coupling.sparse import SparseCoupling

__all__ = [
    "CouplingBounds",
    "EbimPath",
    "Encoder",
    "SparseCoupling",
    "coupling_bounds",
    "coupling_bounds_multi",
    "ebim_greedy",
    "ebim_path",
    "greedy_coupling",
]
