"""Wrappers: `(algorithm, task, **settings) -> algorithm`, one file each; the registry is `algorithms.WRAPPERS`."""

from apfl_jax.algorithms.wrappers.krum import krum

__all__ = ["krum"]
