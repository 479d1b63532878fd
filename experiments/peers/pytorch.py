# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["numpy==2.4.6", "torch==2.13.0"]
# ///
"""PyTorch, eager, one client after another: what a user writes who knows PyTorch and no simulator.

The choices below were the faster ones of those tried on 2 CPU cores, or as fast: `channels_last` (1.2 times the default
layout on `cnn`, 1.7 times on `cnn_small`); `autograd.grad` and one in-place step over all parameters (on the MLP 1.2
times `optim.SGD`, plain, foreach or fused; on the others within the spread); ReLU after the maximum; one thread for the
MLP (1.5 times two: its products are too small to share). The variant `plain` has none of them: the default layout,
`optim.SGD`, a thread a core. Runs on a CUDA device where there is one.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_CNN = {"cnn_small": (3, 16, 32, 64), "cnn": (5, 32, 64, 512)}  # kernel side, channels, channels, features


def network(spec: dict[str, Any], tuned: bool) -> nn.Module:
  """The classifier of a spec, on images [B, channels, height, width]."""
  height, width, depth = spec["image_shape"]
  relu = lambda: nn.ReLU(inplace=tuned)
  if spec["model"] == "mlp":
    return nn.Sequential(nn.Flatten(), nn.Linear(height * width * depth, 200), relu(), nn.Linear(200, spec["classes"]))
  size, first, second, features = _CNN[spec["model"]]
  bend = lambda: (nn.MaxPool2d(2), relu()) if tuned else (relu(), nn.MaxPool2d(2))
  return nn.Sequential(
    nn.Conv2d(depth, first, size, padding="same"),
    *bend(),
    nn.Conv2d(first, second, size, padding="same"),
    *bend(),
    nn.Flatten(),
    nn.Linear((height // 4) * (width // 4) * second, features),
    relu(),
    nn.Linear(features, spec["classes"]),
  )


def prepare(spec: dict[str, Any], train: list, test: list) -> Callable[[], int]:
  """A FedAvg round over all clients, and their tests scored with the new global model."""
  tuned = spec["variant"] != "plain"
  cuda = torch.cuda.is_available()
  layout = torch.channels_last if tuned else torch.contiguous_format
  threads = 1 if tuned and spec["model"] == "mlp" else os.cpu_count() or 1
  torch.manual_seed(spec["seed"])

  def tensors(examples: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (torch.from_numpy(array).to("cuda" if cuda else "cpu") for array in examples)
    images = images.permute(0, 3, 1, 2)
    # Not `contiguous`: with one channel it would leave the strides, and PyTorch would take them for channels last.
    return torch.empty(images.shape, device=images.device, memory_format=layout).copy_(images), labels

  parts, tests = [tensors(x) for x in train], [tensors(x) for x in test]
  model = network(spec, tuned).to("cuda" if cuda else "cpu", memory_format=layout)
  params = list(model.parameters())
  shared = [p.detach().clone() for p in params]
  everything = sum(len(labels) for _, labels in parts)
  optimizer = torch.optim.SGD(params, lr=spec["learning_rate"])

  def descend(images: torch.Tensor, labels: torch.Tensor) -> None:
    loss = F.cross_entropy(model(images), labels)
    if tuned:
      gradients = torch.autograd.grad(loss, params)
      with torch.no_grad():
        torch._foreach_add_(params, gradients, alpha=-spec["learning_rate"])
    else:
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()

  def learn(images: torch.Tensor, labels: torch.Tensor) -> int:
    steps = spec["steps"] or -(-len(labels) // spec["batch"])
    trained = 0
    while steps:
      order = torch.randperm(len(labels), device=labels.device)
      batches = zip(images[order].split(spec["batch"]), labels[order].split(spec["batch"]), strict=True)
      for _, batch in zip(range(steps), batches, strict=False):
        descend(*batch)
        trained += len(batch[1])
        steps -= 1
    return trained

  def run() -> int:
    torch.set_num_threads(threads)  # other cases in this process want another number
    total = [torch.zeros_like(p) for p in shared]
    trained = 0
    for images, labels in parts:
      with torch.no_grad():
        torch._foreach_copy_(params, shared)
      trained += learn(images, labels)
      with torch.no_grad():
        torch._foreach_add_(total, params, alpha=len(labels) / everything)
    with torch.no_grad():
      torch._foreach_copy_(shared, total)
      torch._foreach_copy_(params, total)
    with torch.inference_mode():
      correct = [(model(images).argmax(1) == labels).sum() for images, labels in tests]
      torch.stack(correct).cpu() if correct else shared[0].sum().cpu()  # waits for the device
    return trained

  return run
