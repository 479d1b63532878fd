"""The generator: shapes and sizes, what it depends on, clients under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.errors import InputError
from apfl_jax.nn import feature_generator, generator

SIZE = 6  # of an embedding
SHAPE = (8, 8, 1)


def _inputs(made, batch, seed=0):
  noise_key, table_key = jax.random.split(jax.random.key(seed))
  table = jax.random.normal(table_key, (batch, SIZE))
  return jax.random.normal(noise_key, (batch, made.noise_size)), table / jnp.linalg.norm(table, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def made():
  return generator(SHAPE, SIZE)


@pytest.fixture(scope="module")
def params(made):
  return jax.jit(made.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def apply(made):
  return jax.jit(made.apply)


@pytest.mark.parametrize(
  "shape, noise_size, grid, size",
  [
    ((8, 8, 1), 32, 4 * 4, 132_657),
    ((28, 28, 1), 64, 7 * 7, 437_873),
    ((32, 32, 3), 100, 8 * 8, 709_315),
    ((12, 20, 1), 32, 6 * 10, None),
    ((16, 20, 3), 100, 4 * 5, None),
  ],
)
def test_shapes_and_number_of_parameters(shape, noise_size, grid, size):
  made = generator(shape, SIZE)
  assert made.noise_size == noise_size
  params = jax.eval_shape(made.init, jax.random.key(0))
  images = jax.eval_shape(made.apply, params, *_inputs(made, 3))
  assert images.shape == (3, *shape) and images.dtype == jnp.float32
  dense = (noise_size + 64 + 1) * grid * 64
  film = 65 * 2 * 64 + 65 * 2 * 32
  convolutions = (9 * 64 + 1) * 32 + (9 * 32 + 1) * 8 + (9 * 8 + 1) * shape[2]
  total = sum(x.size for x in jax.tree.leaves(params)) - SIZE * 64
  assert total == dense + film + convolutions
  assert size in (None, total)  # what the docstring says


def test_noise_and_width_can_be_chosen():
  made = generator(SHAPE, SIZE, noise_size=5, width=32)
  params = jax.eval_shape(made.init, jax.random.key(0))
  assert made.noise_size == 5
  assert params["dense"]["kernel"].shape == (5 + 64, 4 * 4 * 32)
  assert params["conv2"]["kernel"].shape == (3, 3, 16, 4)


def test_a_row_does_not_depend_on_the_other_rows(made, params, apply):
  noise, table = _inputs(made, 5)
  whole = apply(params, noise, table)
  alone = apply(params, noise[2:3], table[2:3])
  others = apply(params, noise.at[3:].set(100.0), table.at[:2].set(0.0))
  np.testing.assert_allclose(alone[0], whole[2], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(others[2], whole[2], rtol=1e-5, atol=1e-6)


def test_images_depend_on_noise_and_on_meaning(made, params, apply):
  noise, table = _inputs(made, 5)
  base = apply(params, noise, table)
  assert 0 <= base.min() < base.max() <= 1
  assert jnp.abs(base - apply(params, noise[::-1], table))[0].max() > 0.05
  assert jnp.abs(base - apply(params, noise, table[::-1]))[0].max() > 0.05


def test_the_codes_have_a_useful_size_for_a_large_table():
  # A row of norm 1 must not give a code near 0, where every class would look the same.
  params = jax.jit(generator(SHAPE, 512).init)(jax.random.key(0))
  code = np.full(512, 512**-0.5) @ np.asarray(params["encode"]["kernel"])
  assert 0.7 < code.std() < 1.3


def test_same_key_same_images_and_traced_embeddings(made, params, apply):
  noise, table = _inputs(made, 5)

  @jax.jit
  def images(key, table):
    inside = generator(SHAPE, table.shape[1])
    return inside.apply(inside.init(key), noise, table)

  first, again, other = (images(jax.random.key(seed), table) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, other)
  np.testing.assert_allclose(first, apply(params, noise, table), rtol=1e-4, atol=1e-5)


def test_vmap_over_clients_is_a_loop_over_clients():
  made = generator((8, 8, 1), SIZE, width=16)
  one = jax.jit(made.apply)
  init = jax.jit(made.init)
  clients = [(init(jax.random.key(seed)), *_inputs(made, 4, seed)) for seed in range(3)]
  result = jax.jit(jax.vmap(one))(*jax.tree.map(lambda *rows: np.stack(rows), *clients))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(result))
  expected = jax.tree.map(lambda *rows: np.stack(rows), *[one(*client) for client in clients])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), result, expected)


@pytest.mark.parametrize(
  "shape, options, words",
  [
    ((30, 28, 1), {}, ["30 x 28 x 1", "divisible by 4"]),
    ((9, 8, 1), {}, ["9 x 8 x 1", "divisible by 2"]),
    ((8, 8, 1), {"width": 24}, ["24", "16"]),
  ],
)
def test_what_does_not_fit_is_said_in_one_line(shape, options, words):
  with pytest.raises(InputError) as error:
    generator(shape, SIZE, **options)
  message = str(error.value)
  assert "\n" not in message and all(word in message for word in words)


def test_features_depend_on_noise_and_condition_and_are_not_negative():
  made = feature_generator(4, 9, noise_size=5, hidden=16)
  params = jax.jit(made.init)(jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == (5 + 4 + 1) * 16 + 2 * 16 + (16 + 1) * 9
  noise = jax.random.normal(jax.random.key(1), (3, made.noise_size))
  label = jax.nn.one_hot(jnp.array([0, 1, 0]), 4)
  features = made.apply(params, noise, label)
  assert features.shape == (3, 9) and features.min() == 0 < features.max()
  assert not np.allclose(features[0], features[2])  # another noise
  assert not np.allclose(features[1], made.apply(params, noise, label[::-1] * 0)[1])
  np.testing.assert_allclose(made.apply(params, noise[:1], label[:1])[0], features[0], rtol=1e-5, atol=1e-6)
