"""AP-FL: Wan et al., Asynchronous Personalized Federated Learning through Global Memorization, arXiv 2503.00407.

Not Deng et al.'s "APFL". The paper is known to us through its abstract and public summaries only. Reported [R]: the
server trains a semantic generator from the global model alone, without data; it emits samples of seen and, by
zero-shot learning, of unseen classes; clients mix models by decoupled interpolation. Everything else here (losses,
schedules, coefficients, the friend model) is our reconstruction [O], corrected by pilots [P].
"""

from apfl_jax.algorithms.ap_fl.method import ap_fl, samples
from apfl_jax.algorithms.ap_fl.state import Answering, Server, Shared
from apfl_jax.algorithms.ap_fl.statistics import ByClass

__all__ = ["Answering", "ByClass", "Server", "Shared", "ap_fl", "samples"]
