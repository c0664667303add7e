"""Optional dependencies, imported on use: an error that says what to install instead of a bare ImportError."""

import importlib
from types import ModuleType


def require(module_name: str, extra: str) -> ModuleType:
    """Imports an optional module.

    Args:
        module_name: dotted name of the module, for example "matplotlib.figure".
        extra: the extra of jaxrl-suite that brings it, for example "experiments".

    Returns:
        The module.

    Raises:
        ImportError: the module is not installed; the message names the module and the command that installs it. A
            module that is there but fails to import raises its own error unchanged.

    >>> require("json", "experiments").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        top = module_name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # a dependency of the module is missing: hiding its name would mislead
        raise ImportError(
            f'this needs the module {top!r}, which is not installed. Run: python -m pip install "jaxrl-suite[{extra}]"',
            name=top,
        ) from error
