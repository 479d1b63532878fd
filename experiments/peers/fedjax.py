# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#   "fedjax==0.0.17", "jax==0.4.25", "jaxlib==0.4.25", "dm-haiku==0.0.12", "optax==0.2.2", "chex==0.1.86",
#   "flax==0.8.4", "orbax-checkpoint==0.5.18", "numpy==1.26.4", "scipy==1.12.0",
# ]
# ///
"""FedJAX 0.0.17, its last release, on jax 0.4.25: newer versions lack functions that it calls.

Its own `fed_avg` (the jit backend, its default: one dispatch a step), its own batching and evaluation, models by
`create_model_from_haiku` in the style of its `models/emnist.py`.
"""

from collections.abc import Callable
from typing import Any

import fedjax
import haiku as hk
import jax
import numpy as np
from fedjax.algorithms import fed_avg

_CNN = {"cnn_small": (3, 16, 32, 64), "cnn": (5, 32, 64, 512)}  # kernel side, channels, channels, features


def network(spec: dict[str, Any]) -> fedjax.Model:
  """The classifier of a spec."""

  def forward(batch: Any) -> Any:
    if spec["model"] == "mlp":
      return hk.Sequential([hk.Flatten(), hk.Linear(200), jax.nn.relu, hk.Linear(spec["classes"])])(batch["x"])
    size, first, second, features = _CNN[spec["model"]]
    return hk.Sequential(
      [
        hk.Conv2D(first, size),
        jax.nn.relu,
        hk.MaxPool((1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        hk.Conv2D(second, size),
        jax.nn.relu,
        hk.MaxPool((1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        hk.Flatten(),
        hk.Linear(features),
        jax.nn.relu,
        hk.Linear(spec["classes"]),
      ]
    )(batch["x"])

  return fedjax.create_model_from_haiku(
    transformed_forward_pass=hk.transform(forward),
    sample_batch={"x": np.zeros((1, *spec["image_shape"]), np.float32), "y": np.zeros(1, np.int32)},
    train_loss=lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits),
    eval_metrics={"accuracy": fedjax.metrics.Accuracy()},
  )


def prepare(spec: dict[str, Any], train: list, test: list) -> Callable[[], int]:
  """A FedAvg round over all clients, and their tests scored with the new global model."""
  model = network(spec)
  hparams = fedjax.ShuffleRepeatBatchHParams(
    batch_size=spec["batch"], num_epochs=None if spec["steps"] else 1, num_steps=spec["steps"] or None
  )
  algorithm = fed_avg.federated_averaging(
    fedjax.model_grad(model), fedjax.optimizers.sgd(spec["learning_rate"]), fedjax.optimizers.sgd(1.0), hparams
  )
  dataset = lambda examples: fedjax.ClientDataset({"x": examples[0], "y": examples[1].astype(np.int32)})
  keys = jax.random.split(jax.random.PRNGKey(spec["seed"]), len(train))
  clients = [(i, dataset(part), key) for i, (part, key) in enumerate(zip(train, keys, strict=True))]
  tests = [dataset(part) for part in test]
  state = algorithm.init(model.init(jax.random.PRNGKey(spec["seed"])))

  def run() -> int:
    nonlocal state
    state, diagnostics = algorithm.apply(state, clients)
    scores = [fedjax.evaluate_model(model, state.params, part.padded_batch(batch_size=64)) for part in tests]
    jax.block_until_ready((state.params, diagnostics, scores))
    return sum(spec["steps"] * spec["batch"] if spec["steps"] else len(part) for _, part, _ in clients)

  return run
