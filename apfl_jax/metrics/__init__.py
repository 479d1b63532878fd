"""Numbers from predictions: confusion matrices, what they say of classes, and how fair they are to clients."""

from apfl_jax.metrics import verification
from apfl_jax.metrics.confusion import accuracy, confusion, recall
from apfl_jax.metrics.fairness import summarise, unseen

__all__ = ["accuracy", "confusion", "recall", "summarise", "unseen", "verification"]
