# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["numpy==2.4.6", "torch==2.13.0"]
# ///
"""FedAvg in the style of PFLlib: client objects with a module, an optimizer and a data loader each, all resident.

PFLlib cannot be installed; this is ours, after what its code does (`clientbase.py`, `clientavg.py`, `serverbase.py` of
commit d832e76 [C]): every client keeps a deep copy of the model, parameters are downloaded and summed by loops over
`parameters()` that clone them, examples are pairs in a list behind a shuffling `DataLoader`. What differs: the last
short batch is not dropped, so that the same examples are trained on; examples are not read from disk anew in every
epoch; only tests are scored (PFLlib scores training examples too and computes an AUC). All three make it faster or
leave it as it is.
"""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

_CNN = {"cnn_small": (3, 16, 32, 64), "cnn": (5, 32, 64, 512)}  # kernel side, channels, channels, features


def network(spec: dict[str, Any]) -> nn.Module:
  """The classifier of a spec, on images [B, channels, height, width]."""
  height, width, depth = spec["image_shape"]
  if spec["model"] == "mlp":
    return nn.Sequential(
      nn.Flatten(), nn.Linear(height * width * depth, 200), nn.ReLU(), nn.Linear(200, spec["classes"])
    )
  size, first, second, features = _CNN[spec["model"]]
  return nn.Sequential(
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


def pairs(examples: tuple) -> list[tuple[torch.Tensor, torch.Tensor]]:
  """(image, label) of each example."""
  images, labels = (torch.from_numpy(array) for array in examples)
  images = images.permute(0, 3, 1, 2)
  # Not `contiguous`: with one channel it would leave the strides, and PyTorch would take them for channels last.
  return list(zip(torch.empty(images.shape).copy_(images), labels, strict=True))


class Client:
  """One client and all that it owns."""

  def __init__(self, model: nn.Module, train: tuple, test: tuple | None, spec: dict[str, Any]):
    """Args: the global model, (images, labels) to train and to test on, the spec."""
    self.model = copy.deepcopy(model)
    self.loss = nn.CrossEntropyLoss()
    self.optimizer = torch.optim.SGD(self.model.parameters(), lr=spec["learning_rate"])
    self.train_samples = len(train[1])
    self.train_loader = DataLoader(pairs(train), spec["batch"], shuffle=True)
    self.test_loader = DataLoader(pairs(test), spec["batch"]) if test else None
    self.steps = spec["steps"] or len(self.train_loader)

  def set_parameters(self, model: nn.Module) -> None:
    """Download."""
    for new, old in zip(model.parameters(), self.model.parameters(), strict=True):
      old.data = new.data.clone()

  def train(self) -> int:
    """Local SGD; returns how many examples were trained on."""
    self.model.train()
    steps, trained = self.steps, 0
    while steps:
      for _, (images, labels) in zip(range(steps), self.train_loader, strict=False):
        loss = self.loss(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        steps -= 1
        trained += len(labels)
    return trained

  def test(self) -> int:
    """How many test examples are classified correctly."""
    assert self.test_loader is not None
    self.model.eval()
    correct = 0
    with torch.no_grad():
      for images, labels in self.test_loader:
        correct += int((self.model(images).argmax(1) == labels).sum().item())
    return correct


def prepare(spec: dict[str, Any], train: list, test: list) -> Callable[[], int]:
  """A FedAvg round over all clients, and their tests scored with the new global model."""
  torch.manual_seed(spec["seed"])
  model = network(spec)
  clients = [Client(model, part, score, spec) for part, score in zip(train, test or [None] * len(train), strict=True)]
  everything = sum(client.train_samples for client in clients)

  def run() -> int:
    torch.set_num_threads(os.cpu_count() or 1)
    trained = 0
    for client in clients:
      client.set_parameters(model)
    for client in clients:
      trained += client.train()
    for parameter in model.parameters():
      parameter.data.zero_()
    for client in clients:
      for own, uploaded in zip(model.parameters(), client.model.parameters(), strict=True):
        own.data += uploaded.data.clone() * (client.train_samples / everything)
    if test:
      for client in clients:
        client.set_parameters(model)
        client.test()
    return trained

  return run
