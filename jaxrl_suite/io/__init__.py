"""Everything impure: files, checkpoints, metrics, progress, plots, profiling and the report.

Imported by experiments only; algorithms return values. Modules load on first use, and what is optional (matplotlib,
rich, tensorboardX, wandb) is imported inside the function that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_suite.io import checkpoint, files, metrics, plots, processes, profiling, progress, report

__all__ = ["checkpoint", "files", "metrics", "plots", "processes", "profiling", "progress", "report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
