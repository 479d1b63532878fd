"""What one client does: local SGD, fine-tuning, losses, evaluation over a span."""

from apfl_jax.training.batches import Batch, draw, images_of, label_histogram
from apfl_jax.training.evaluation import Evaluation, evaluate
from apfl_jax.training.losses import classification_loss, cross_entropy, predict
from apfl_jax.training.sgd import descend, fine_tune, local_sgd, num_steps, weight

__all__ = [
  "Batch",
  "Evaluation",
  "classification_loss",
  "cross_entropy",
  "descend",
  "draw",
  "evaluate",
  "fine_tune",
  "images_of",
  "label_histogram",
  "local_sgd",
  "num_steps",
  "predict",
  "weight",
]
