# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["numpy==2.4.6", "pfl==0.5.1", "torch==2.13.0"]
# ///
"""pfl-research 0.5.1 (`pfl` on PyPI) with PyTorch, as its image-classification benchmark sets it up.

After `benchmarks/image_classification` of commit c9d1f32 [C]: `FederatedAveraging` on a `SimulatedBackend` in one
process, `torch.optim.SGD` on clients and with rate 1 on the server, a `MinimizeReuseUserSampler`, no privacy mechanism,
no validation cohort. What differs: images are noise, and the network is the one that all sides of a case have (its own
has two unpadded 3 x 3 convolutions, one maximum, a dense layer of 128 and dropout). It does not shuffle examples.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn import functional as F

_CNN = {"cnn_small": (3, 16, 32, 64), "cnn": (5, 32, 64, 512)}  # kernel side, channels, channels, features


class Network(nn.Sequential):
  """A classifier with the two methods that pfl-research asks for."""

  def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What clients descend on."""
    self.train()
    return F.cross_entropy(self(images.permute(0, 3, 1, 2)), labels)

  @torch.no_grad()
  def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """What is reported."""
    self.eval()
    correct = (self(images.permute(0, 3, 1, 2)).argmax(1) == labels).sum().item()
    return {"accuracy": Weighted(correct, len(labels))}


def network(spec: dict[str, Any]) -> Network:
  """The classifier of a spec, on images [B, channels, height, width]."""
  height, width, depth = spec["image_shape"]
  if spec["model"] == "mlp":
    return Network(nn.Flatten(), nn.Linear(height * width * depth, 200), nn.ReLU(), nn.Linear(200, spec["classes"]))
  size, first, second, features = _CNN[spec["model"]]
  return Network(
    nn.Conv2d(depth, first, size, padding="same"),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(first, second, size, padding="same"),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear((height // 4) * (width // 4) * second, features),
    nn.ReLU(),
    nn.Linear(features, spec["classes"]),
  )


def prepare(spec: dict[str, Any], train: list, test: list) -> Callable[[], int]:
  """A central iteration with all clients as its cohort."""
  if test:
    raise NotImplementedError("pfl-research scores clients before and after training them, not with the new model")
  epochs = {spec["steps"] * spec["batch"] / len(labels) if spec["steps"] else 1 for _, labels in train}
  if any(epoch != int(epoch) for epoch in epochs) or len(epochs) > 1:
    raise NotImplementedError(f"pfl-research takes the same whole number of epochs for all, not {sorted(epochs)}")
  torch.manual_seed(spec["seed"])
  tensors = [(torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in train]
  module = network(spec)
  model = PyTorchModel(
    model=module,
    local_optimizer_create=torch.optim.SGD,
    central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
  )
  users = FederatedDataset(
    lambda user: Dataset(raw_data=list(tensors[user]), user_id=str(user)),
    get_user_sampler("minimize_reuse", list(range(len(tensors)))),
  )
  backend = SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()])
  algorithm: FederatedAveraging = FederatedAveraging()
  done = 0

  def run() -> int:
    nonlocal done
    torch.set_num_threads(os.cpu_count() or 1)
    done += 1
    algorithm.run(
      algorithm_params=NNAlgorithmParams(
        central_num_iterations=done,
        evaluation_frequency=1_000_000,  # iteration 0 alone, the one that is not timed
        train_cohort_size=len(tensors),
        val_cohort_size=0,
      ),
      backend=backend,
      model=model,
      model_train_params=NNTrainHyperParams(
        local_num_epochs=int(min(epochs)), local_learning_rate=spec["learning_rate"], local_batch_size=spec["batch"]
      ),
      model_eval_params=NNEvalHyperParams(local_batch_size=spec["batch"]),
    )
    return sum(len(labels) for _, labels in tensors) * int(min(epochs))

  return run
