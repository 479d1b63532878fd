"""The methods: one file each, made by `method(task, **settings)`, listed once in `METHODS`; wrappers in `WRAPPERS`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from apfl_jax.algorithms import ap_fl as ap_fl_package
from apfl_jax.algorithms.adaptive_pfl import adaptive_pfl
from apfl_jax.algorithms.ap_fl import ap_fl
from apfl_jax.algorithms.central import central
from apfl_jax.algorithms.dense import dense
from apfl_jax.algorithms.ditto import ditto
from apfl_jax.algorithms.fedala import fedala
from apfl_jax.algorithms.fedasync import fedasync
from apfl_jax.algorithms.fedavg import fedavg
from apfl_jax.algorithms.fedavg_ft import fedavg_ft
from apfl_jax.algorithms.fedbabu import fedbabu
from apfl_jax.algorithms.fedbuff import fedbuff
from apfl_jax.algorithms.feddbe import feddbe
from apfl_jax.algorithms.feddyn import feddyn
from apfl_jax.algorithms.fedftg import fedftg
from apfl_jax.algorithms.fedftg import samples as fedftg_samples
from apfl_jax.algorithms.fedgen import fedgen
from apfl_jax.algorithms.fednova import fednova
from apfl_jax.algorithms.fedopt import fedadam, fedavgm, fedyogi
from apfl_jax.algorithms.fedper import fedper
from apfl_jax.algorithms.fedproto import fedproto
from apfl_jax.algorithms.fedprox import fedprox
from apfl_jax.algorithms.fedrep import fedrep
from apfl_jax.algorithms.fedrod import fedrod
from apfl_jax.algorithms.fl_fdms import fl_fdms
from apfl_jax.algorithms.gpfl import gpfl
from apfl_jax.algorithms.knn_per import knn_per
from apfl_jax.algorithms.lg_fedavg import lg_fedavg
from apfl_jax.algorithms.local import local
from apfl_jax.algorithms.mifa import mifa
from apfl_jax.algorithms.moon import moon
from apfl_jax.algorithms.pafedfv import pafedfv
from apfl_jax.algorithms.per_fedavg import per_fedavg
from apfl_jax.algorithms.persafl import persafl
from apfl_jax.algorithms.pfedme import pfedme
from apfl_jax.algorithms.scaffold import scaffold
from apfl_jax.algorithms.wrappers import krum
from apfl_jax.algorithms.wrappers.krum import least_uploads as krum_least_uploads
from apfl_jax.settings import Limits, Setting, checked, of
from apfl_jax.types import Algorithm, Task


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the table of methods.

  Attributes:
    make: (task, **settings) -> Algorithm; the first line of its docstring is what help says of it.
    paper: where it comes from.
    group: under which heading tables list it, a key of `GROUPS`.
    keeps: what stays on the client between visits.
    samples: (task, server, key, count, **settings) -> images [C, count, ...] in [0, 1], if it has a generator; None
      where these settings of the method let it make none.
    trust: (server) -> float [C] in [0, 1], how far it believes samples of each class, if it says so.
    pools: whether its clients train on all clients' examples, see `data.pooled`.
    rounds_of: the method whose rounds and server it has as they are, where only its personal models are its own.

  Raises:
    InputError: there is no such group.
  """

  make: Callable[..., Algorithm]
  paper: str
  group: str
  keeps: str = "nothing"
  samples: Callable[..., Any] | None = None
  trust: Callable[..., Any] | None = None
  pools: bool = False
  rounds_of: str = ""

  def __post_init__(self) -> None:
    checked("group", self.group, str, Limits(choices=GROUPS))


class Wrapper(NamedTuple):
  """A row of the table of wrappers.

  Attributes:
    make: (algorithm, task, **settings) -> Algorithm.
    paper: where it comes from.
    least_uploads: (**settings) -> how many uploads a round needs for what the paper promises.
  """

  make: Callable[..., Algorithm]
  paper: str
  least_uploads: Callable[..., int] = lambda **settings: 1


GROUPS = {
  "global": "one model for all clients",
  "personalised": "a model for each client",
  "generators": "a server that learns to draw examples or features",
  "asynchronous": "made for updates that come late",
  "bounds": "what a federation is measured by",
}


METHODS: dict[str, Method] = {
  "adaptive_pfl": Method(
    adaptive_pfl, "Deng et al. 2020, arXiv 2003.13461 ('APFL')", "personalised", keeps="its model and its mixing weight"
  ),
  "ap_fl": Method(
    ap_fl,
    "Wan et al. 2025, arXiv 2503.00407 (reconstructed)",
    "generators",
    samples=ap_fl_package.samples,
    trust=lambda server: server.trust,
  ),
  "central": Method(central, "the upper bound", "bounds", pools=True),
  "dense": Method(dense, "Zhang et al. 2022, arXiv 2112.12371", "generators"),
  "ditto": Method(ditto, "Li et al. 2021, arXiv 2012.04221", "personalised", keeps="its model"),
  "fedadam": Method(fedadam, "Reddi et al. 2021, arXiv 2003.00295", "global"),
  "fedala": Method(
    fedala, "Zhang et al. 2023, arXiv 2212.01197", "personalised", keeps="its model and its head's weights"
  ),
  "fedasync": Method(fedasync, "Xie et al. 2019, arXiv 1903.03934", "asynchronous"),
  "fedavg": Method(fedavg, "McMahan et al. 2017, arXiv 1602.05629", "global"),
  "fedavg_ft": Method(fedavg_ft, "Wang et al. 2019, arXiv 1910.10252", "personalised", rounds_of="fedavg"),
  "fedavgm": Method(fedavgm, "Hsu et al. 2019, arXiv 1909.06335", "global"),
  "fedbabu": Method(fedbabu, "Oh et al. 2022, arXiv 2106.06042", "personalised"),
  "fedbuff": Method(fedbuff, "Nguyen et al. 2022, arXiv 2106.06639", "asynchronous"),
  "feddbe": Method(feddbe, "Zhang et al. 2023, arXiv 2311.14975", "personalised", keeps="its mean representation"),
  "feddyn": Method(feddyn, "Acar et al. 2021, arXiv 2111.04263", "global", keeps="the sum of its moves"),
  "fedftg": Method(fedftg, "Zhang et al. 2022, arXiv 2203.09249", "generators", samples=fedftg_samples),
  "fedgen": Method(fedgen, "Zhu et al. 2021, arXiv 2105.10056", "generators"),
  "fednova": Method(fednova, "Wang et al. 2020, arXiv 2007.07481", "global"),
  "fedper": Method(fedper, "Arivazhagan et al. 2019, arXiv 1912.00818", "personalised", keeps="its head"),
  "fedproto": Method(fedproto, "Tan et al. 2022, arXiv 2105.00243", "personalised", keeps="its model"),
  "fedprox": Method(fedprox, "Li et al. 2020, arXiv 1812.06127", "global"),
  "fedrep": Method(fedrep, "Collins et al. 2021, arXiv 2102.07078", "personalised", keeps="its head"),
  "fedrod": Method(fedrod, "Chen and Chao 2022, arXiv 2107.00778", "personalised", keeps="its head"),
  "fedyogi": Method(fedyogi, "Reddi et al. 2021, arXiv 2003.00295", "global"),
  "fl_fdms": Method(fl_fdms, "Wang and Xu 2022, arXiv 2205.13222", "global"),
  "gpfl": Method(gpfl, "Zhang et al. 2023, arXiv 2308.10279", "personalised", keeps="its head"),
  "knn_per": Method(knn_per, "Marfoq et al. 2022, arXiv 2111.09360", "personalised", rounds_of="fedavg"),
  "lg_fedavg": Method(lg_fedavg, "Liang et al. 2020, arXiv 2001.01523", "personalised", keeps="its base"),
  "local": Method(local, "the lower bound", "bounds", keeps="its model"),
  "mifa": Method(mifa, "Gu et al. 2021, arXiv 2106.04159", "global", keeps="its last two updates"),
  "moon": Method(moon, "Li et al. 2021, arXiv 2103.16257", "global", keeps="its last model"),
  "pafedfv": Method(
    pafedfv,
    "Mu et al. 2024, arXiv 2404.13237 (reconstructed)",
    "asynchronous",
    keeps="its head and what waiting brought",
  ),
  "per_fedavg": Method(per_fedavg, "Fallah et al. 2020, arXiv 2002.07948", "personalised"),
  "persafl": Method(persafl, "Toghani et al. 2022, arXiv 2210.01176", "asynchronous"),
  "pfedme": Method(pfedme, "Dinh et al. 2020, arXiv 2006.08848", "personalised"),
  "scaffold": Method(scaffold, "Karimireddy et al. 2020, arXiv 1910.06378", "global", keeps="its control variate"),
}

WRAPPERS: dict[str, Wrapper] = {
  "krum": Wrapper(krum, "Blanchard et al. 2017, arXiv 1703.02757", least_uploads=krum_least_uploads),
}


def grouped() -> dict[str, dict[str, Method]]:
  """The methods by group, in the order of `GROUPS`."""
  found = {group: {name: method for name, method in METHODS.items() if method.group == group} for group in GROUPS}
  return {group: methods for group, methods in found.items() if methods}


def settings(name: str) -> dict[str, Setting]:
  """A method's or a wrapper's own settings: the keyword-only arguments of its `make`."""
  return of((METHODS.get(name) or WRAPPERS[name]).make)


__all__ = [
  "GROUPS",
  "METHODS",
  "WRAPPERS",
  "Algorithm",
  "Method",
  "Task",
  "Wrapper",
  "adaptive_pfl",
  "ap_fl",
  "central",
  "dense",
  "ditto",
  "fedadam",
  "fedala",
  "fedasync",
  "fedavg",
  "fedavg_ft",
  "fedavgm",
  "fedbabu",
  "fedbuff",
  "feddbe",
  "feddyn",
  "fedftg",
  "fedgen",
  "fednova",
  "fedper",
  "fedproto",
  "fedprox",
  "fedrep",
  "fedrod",
  "fedyogi",
  "fl_fdms",
  "gpfl",
  "grouped",
  "knn_per",
  "krum",
  "lg_fedavg",
  "local",
  "mifa",
  "moon",
  "pafedfv",
  "per_fedavg",
  "persafl",
  "pfedme",
  "scaffold",
  "settings",
]
