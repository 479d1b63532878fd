"""What methods share whose server learns from clients' models without any example: FedGen, DENSE, FedFTG."""

import jax
import jax.numpy as jnp

from apfl_jax.types import Array, Params, Task

APART = 0x44617461  # folded into a key that is also split: no small number, those are the children of the split


def average(params: Params, weight: Array) -> Params:
  """FedAvg's server: the mean of the models [K, ...] with float32 [K] weights, 0 for one that did not arrive."""
  share = weight / jnp.sum(weight)
  return jax.tree.map(lambda w: jnp.tensordot(share, w, 1), params)


def answers(task: Task, params: Params, images: Array) -> tuple[Array, tuple[Array, ...]]:
  """Logits [K, B, C] and taps of K models on the same images [B, height, width, channels], for the images' gradient."""

  def of(params: Params) -> tuple[Array, tuple[Array, ...]]:
    features, taps = task.model.frozen.base(params.base, images)
    return task.model.head(params.head, features), taps

  return jax.vmap(of)(params)


def class_shares(counts: Array) -> Array:
  """[K, C]: what share of the examples of a class each client holds; 0 where nobody has one."""
  return counts / jnp.maximum(jnp.sum(counts, axis=0), 1.0)


def diversity(noise: Array, made: Array) -> Array:
  """exp(-mean_{j, k} |z_j - z_k|^2 |x_j - x_k|), means over coordinates: 1 where all samples are alike.

  Args:
    noise: z, [B, noise size].
    made: x, [B, ...].

  Returns:
    [], as in the code of FedGen and of FedFTG [C]: the square norm for noise, the absolute value for samples.
  """
  made = made.reshape(len(made), -1)
  squares = jnp.mean((noise[:, None] - noise) ** 2, axis=-1)
  apart = jnp.mean(jnp.abs(made[:, None] - made), axis=-1)
  return jnp.exp(-jnp.mean(squares * apart))
