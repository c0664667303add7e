"""Public checks for people who add algorithms: contracts and the one table of tolerances."""

from jaxrl_suite.testing.contracts import (
    Algorithm,
    Loop,
    check_chunked_equals_whole,
    check_dtype_kept,
    check_gradients,
    check_jit_equals_eager,
    check_one_trace,
    check_save_restore,
    check_vmap_equals_loop,
    relative_gradient_error,
)
from jaxrl_suite.testing.tolerances import assert_close, tolerance

__all__ = [
    "Algorithm",
    "Loop",
    "assert_close",
    "check_chunked_equals_whole",
    "check_dtype_kept",
    "check_gradients",
    "check_jit_equals_eager",
    "check_one_trace",
    "check_save_restore",
    "check_vmap_equals_loop",
    "relative_gradient_error",
    "tolerance",
]
