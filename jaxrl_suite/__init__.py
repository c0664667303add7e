"""jaxrl-suite: a functional research toolkit in JAX.

Import a package of the toolkit by its name, for example ``from jaxrl_suite import coupling``.
Importing this module loads nothing else and changes no JAX setting.
"""

__version__ = "0.1.0"
