"""Numbers from predictions: confusion matrices, what they say of classes, how fair they are, who is ahead."""

from apfl_jax.metrics import fairness, privacy, samples, time, verification
from apfl_jax.metrics.confusion import accuracy, confusion, recall, shared_answers
from apfl_jax.metrics.fairness import summarise, unseen
from apfl_jax.metrics.paired import Paired, paired

__all__ = [
  "Paired",
  "accuracy",
  "confusion",
  "fairness",
  "paired",
  "privacy",
  "recall",
  "samples",
  "shared_answers",
  "summarise",
  "time",
  "unseen",
  "verification",
]
