"""The methods: one file each, made by `method(task, **settings)`, listed once in `METHODS`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from apfl_jax.algorithms import ap_fl as ap_fl_package
from apfl_jax.algorithms.ap_fl import ap_fl
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.algorithms.fedavg_ft import fedavg_ft
from apfl_jax.algorithms.local import local
from apfl_jax.algorithms.scaffold import scaffold
from apfl_jax.settings import Setting, of
from apfl_jax.types import Algorithm, Task


class Method(NamedTuple):
  """A row of the table of methods.

  Attributes:
    make: (task, **settings) -> Algorithm.
    paper: where it comes from.
    keeps: what stays on the client between visits.
    head: the classifier's head that `--head=auto` gives it.
    samples: (task, server, key, count) -> images [C, count, ...] in [0, 1], if it has a generator.
  """

  make: Callable[..., Algorithm]
  paper: str
  keeps: str = "nothing"
  head: str = "free"
  samples: Callable[..., Any] | None = None


METHODS: dict[str, Method] = {
  "ap_fl": Method(
    ap_fl, "Wan et al. 2025, arXiv 2503.00407 (reconstructed)", head="anchored", samples=ap_fl_package.samples
  ),
  "fedavg": Method(fedavg, "McMahan et al. 2017, arXiv 1602.05629"),
  "fedavg_ft": Method(fedavg_ft, "Wang et al. 2019, arXiv 1910.10252"),
  "local": Method(local, "the lower bound", keeps="its model"),
  "scaffold": Method(scaffold, "Karimireddy et al. 2020, arXiv 1910.06378", keeps="its control variate"),
}


def settings(name: str) -> dict[str, Setting]:
  """A method's own settings: the keyword-only arguments of its `make`."""
  return of(METHODS[name].make)


__all__ = ["METHODS", "Algorithm", "Method", "Task", "ap_fl", "fedavg", "fedavg_ft", "local", "scaffold", "settings"]
