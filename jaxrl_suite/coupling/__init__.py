"""Minimum entropy coupling, and the bottleneck in front of it.

A *coupling* of two laws p and q is a joint law with these marginals; the one of least joint entropy makes one variable
say as much as possible about the other. Everything here is a pure function of arrays for one instance, under jit, vmap
and grad; rates, entropies and information are in bits; symbols of mass zero are absent, so padding is a mask.

Couplings      :func:`greedy_coupling` with a derivative that stores only its path, :func:`greedy_coupling_multi` for K
               marginals, :class:`SparseCoupling`, :func:`integer_masses` for exact agreement between machines.
Smooth ones    :func:`soft_coupling` between independence and greedy by a temperature, :func:`sharpen_coupling`: for
               training through a coupling.
Bounds         :func:`coupling_bounds`, four lower bounds on the joint entropy of every coupling;
               :func:`certified_coupling` (entropy, bound, gap) and :func:`polished_coupling`.
Encoders       :func:`ebim_greedy`, :func:`ebim_path`: the most informative code of a source at a bounded code entropy;
               :func:`ebim_refine` (stochastic, theorem 3), :func:`ebim_exact` over all :func:`partitions`;
               :func:`quantize_uniform` and :func:`quantize_lpt` as baselines.
Bottleneck     :func:`mecb`: encoder and decoder for two given laws and a rate, in three searches.

Long messages are in :mod:`jaxrl_suite.coupling.iterative` (FIMEC, independent blocks) and
:mod:`jaxrl_suite.coupling.arimec` (any sequence law); games in :mod:`jaxrl_suite.coupling.games`,
:mod:`jaxrl_suite.coupling.factored_games` and, by enumeration, :mod:`jaxrl_suite.coupling.exact_games`.

References:
    Ebrahimi, Chen, Khisti, Minimum Entropy Coupling with Bottleneck, 2024, arXiv 2410.21666.
"""

from jaxrl_suite.coupling.bottleneck import Bottleneck, mecb
from jaxrl_suite.coupling.bounds import CouplingBounds, coupling_bounds, coupling_bounds_multi
from jaxrl_suite.coupling.ebim import EbimPath, Encoder, ebim_greedy, ebim_path
from jaxrl_suite.coupling.greedy import greedy_coupling
from jaxrl_suite.coupling.integer import integer_masses
from jaxrl_suite.coupling.multi import greedy_coupling_multi
from jaxrl_suite.coupling.partitions import ebim_exact, partitions
from jaxrl_suite.coupling.polish import CertifiedCoupling, certified_coupling, polished_coupling
from jaxrl_suite.coupling.quantizers import quantize_lpt, quantize_uniform
from jaxrl_suite.coupling.refine import StochasticEncoder, ebim_refine
from jaxrl_suite.coupling.smooth import sharpen_coupling, soft_coupling
from jaxrl_suite.coupling.sparse import SparseCoupling

__all__ = [
    "Bottleneck",
    "CertifiedCoupling",
    "CouplingBounds",
    "EbimPath",
    "Encoder",
    "SparseCoupling",
    "StochasticEncoder",
    "certified_coupling",
    "coupling_bounds",
    "coupling_bounds_multi",
    "ebim_exact",
    "ebim_greedy",
    "ebim_path",
    "ebim_refine",
    "greedy_coupling",
    "greedy_coupling_multi",
    "integer_masses",
    "mecb",
    "partitions",
    "polished_coupling",
    "quantize_lpt",
    "quantize_uniform",
    "sharpen_coupling",
    "soft_coupling",
]
