"""What one client does: local SGD, fine-tuning, losses, evaluation over a span."""

from apfl_jax.training.augment import max_shift, shift
from apfl_jax.training.batches import Batch, draw, gather, label_histogram
from apfl_jax.training.evaluation import Evaluation, evaluate, verify
from apfl_jax.training.losses import (
  READOUTS,
  SOFTMAX_MASKS,
  batch_cross_entropy,
  batch_mean,
  classification_loss,
  cross_entropy,
  feature_size,
  log_prior,
  logit_offset,
  predict,
  proximal,
)
from apfl_jax.training.sgd import batches, descend, fine_tune, follow, local_sgd, num_steps, weight

__all__ = [
  "READOUTS",
  "SOFTMAX_MASKS",
  "Batch",
  "Evaluation",
  "batch_cross_entropy",
  "batch_mean",
  "classification_loss",
  "cross_entropy",
  "descend",
  "batches",
  "draw",
  "evaluate",
  "feature_size",
  "fine_tune",
  "follow",
  "gather",
  "label_histogram",
  "local_sgd",
  "log_prior",
  "logit_offset",
  "max_shift",
  "num_steps",
  "predict",
  "proximal",
  "shift",
  "verify",
  "weight",
]
