"""Numbers from predictions: confusion matrices, what they say of classes, how fair they are, who is ahead."""

from apfl_jax.metrics import time, verification
from apfl_jax.metrics.confusion import accuracy, confusion, recall
from apfl_jax.metrics.fairness import summarise, unseen
from apfl_jax.metrics.paired import Paired, paired

__all__ = ["Paired", "accuracy", "confusion", "paired", "recall", "summarise", "time", "unseen", "verification"]
