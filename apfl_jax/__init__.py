"""Vectorised simulation of federated learning in JAX.

A federated method is written for one client and run for a million, on whatever devices there are, with everyone's
absence a part of the state. The parts are subpackages, imported where they are used; from the bottom up: `types`,
`data`, `nn`, `semantics`, `metrics`, `population`, `training`, `algorithms`, `simulation`, `report`.
"""

__version__ = "0.1.0"
