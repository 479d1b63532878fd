"""Networks: Flax NNX modules inside, pure functions of plain parameter dicts outside."""

from apfl_jax.nn.classifiers import HEADS, MODELS, classifier
from apfl_jax.nn.generators import feature_generator, generator
from apfl_jax.nn.layers import Conv, conv2d, conv2d_max_pool, functional, max_pool, upsample

__all__ = [
  "HEADS",
  "MODELS",
  "Conv",
  "classifier",
  "conv2d",
  "conv2d_max_pool",
  "feature_generator",
  "functional",
  "generator",
  "max_pool",
  "upsample",
]
