"""Pure simulators, each a module of its own: import the one you need, ``from jaxrl_suite.envs import ...``.

Adapters to other libraries (gymnasium, mo-gymnasium, reasoning-gym) import them on use.
"""
