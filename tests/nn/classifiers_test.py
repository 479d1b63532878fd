"""Classifiers: sizes known from the literature, a NumPy forward pass, heads, clients under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.errors import InputError
from apfl_jax.nn import HEADS, MODELS, classifier

SHAPE = (8, 8, 1)


def _images(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).random(shape, dtype=np.float32))


def _table():
  table = np.random.default_rng(9).standard_normal((5, 7))
  return jnp.asarray(table / np.linalg.norm(table, axis=1, keepdims=True), jnp.float32)


def _model(name="cnn_small", head="free", **options):
  return classifier(name, SHAPE, 5, head=head, embeddings=None if head == "free" else _table(), **options)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "name, size",
  [
    ("cnn", 1_663_370),  # as reported for MNIST by McMahan et al. 2017
    ("cnn_small", 160 + 4_640 + 7 * 7 * 32 * 64 + 64 + 650),
    ("mlp", 785 * 200 + 2_010),
  ],
)
def test_number_of_parameters(name, size):
  assert _size(jax.eval_shape(classifier(name, (28, 28, 1), 10).init, jax.random.key(0))) == size


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", HEADS)
def test_shapes_types_and_plain_dicts(name, head):
  model = classifier(name, (9, 6, 3), 5, head=head, embeddings=_table(), dtype=jnp.bfloat16)

  def run(key, images):
    params = model.init(key)
    features, taps = model.base(params.base, images)
    return params, features, taps, model.head(params.head, features)

  params, features, taps, logits = jax.eval_shape(run, jax.random.key(0), _images(0, 4, 9, 6, 3))
  paths = jax.tree_util.tree_flatten_with_path(params)[0]
  assert all(isinstance(k, jax.tree_util.DictKey) and isinstance(k.key, str) for path, _ in paths for k in path[1:])
  width = {"mlp": 200, "cnn_small": 64, "cnn": 512}[name]
  first, second = {"mlp": (0, 0), "cnn_small": (16, 32), "cnn": (32, 64)}[name]
  convolutional = [(4, 9, 6, first), (4, 4, 3, second)] if first else []
  assert [tap.shape for tap in taps] == [*convolutional, (4, width)]
  assert features.shape == (4, width) and logits.shape == (4, 5)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((params, features, taps, logits)))


def test_mlp_is_two_matrix_products_of_scaled_images():
  model = _model("mlp")
  params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
  images = np.asarray(_images(0, 3, *SHAPE))
  hidden = (2 * images.reshape(3, -1) - 1) @ params.base["dense"]["kernel"] + params.base["dense"]["bias"]
  features, taps = model.base(params.base, images)
  np.testing.assert_allclose(taps[0], hidden, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(features, np.maximum(hidden, 0), rtol=1e-5, atol=1e-5)
  logits = np.maximum(hidden, 0) @ params.head["kernel"] + params.head["bias"]
  np.testing.assert_allclose(model.head(params.head, features), logits, rtol=1e-5, atol=1e-5)


def test_cnn_matches_xla_layer_by_layer():
  model = _model("cnn")
  params = jax.jit(model.init)(jax.random.key(0))
  images = _images(0, 2, *SHAPE)
  x, taps = 2 * images - 1, []
  for conv in ("conv1", "conv2"):
    layer = params.base[conv]
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=dimensions)
    taps.append(x + layer["bias"][None, None, None])
    x = jnp.maximum(taps[-1], 0)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
  taps.append(x.reshape(2, -1) @ params.base["dense"]["kernel"] + params.base["dense"]["bias"][None])
  features, result = jax.jit(model.base)(params.base, images)
  for got, want in zip(result, taps, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(features, jnp.maximum(taps[-1], 0), rtol=1e-4, atol=1e-4)


def test_anchored_head_scores_the_rows_of_the_table():
  model = _model("mlp", head="anchored")
  params = jax.jit(model.init)(jax.random.key(0))
  features = _images(1, 3, 200)
  projected = np.asarray(features) @ np.asarray(params.head["kernel"])
  expected = [[projected[b] @ np.asarray(_table())[c] for c in range(5)] for b in range(3)]
  assert params.head.keys() == {"kernel"}
  np.testing.assert_allclose(model.head(params.head, features), expected, rtol=1e-4, atol=1e-5)


def test_cosine_head_scores_ten_times_the_cosine_and_is_smooth_at_zero():
  model, table = _model("mlp", head="cosine"), np.asarray(_table())
  params = jax.jit(model.init)(jax.random.key(0)).head
  features = np.asarray(_images(1, 4, 200))
  meant = features @ np.asarray(params["kernel"])
  expected = 10 * (meant / np.linalg.norm(meant, axis=1, keepdims=True)) @ table.T
  np.testing.assert_allclose(jax.jit(model.head)(params, features), expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(model.semantics(params, features), meant, rtol=1e-5, atol=1e-5)
  slope = jax.jit(jax.grad(lambda params: jnp.sum(model.head(params, jnp.zeros((2, 200))) ** 2)))(params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_onehot_anchored_head_is_the_free_head_without_bias():
  features = _images(1, 3, 200)
  anchored = classifier("mlp", SHAPE, 5, head="anchored", embeddings=jnp.eye(5))
  params = jax.jit(anchored.init)(jax.random.key(0)).head
  free = _model("mlp").head({"kernel": params["kernel"], "bias": jnp.zeros(5)}, features)
  np.testing.assert_allclose(anchored.head(params, features), free, rtol=1e-6, atol=1e-6)


def test_embeddings_may_be_traced():
  model = _model("mlp", head="anchored")
  params = jax.jit(model.init)(jax.random.key(0))

  @jax.jit
  def logits(table, images):
    model = classifier("mlp", SHAPE, 5, head="anchored", embeddings=table)
    return model.head(params.head, model.base(params.base, images)[0])

  images = _images(0, 2, *SHAPE)
  expected = model.head(params.head, model.base(params.base, images)[0])
  np.testing.assert_allclose(logits(_table(), images), expected, rtol=1e-5, atol=1e-5)
  permuted = logits(_table()[::-1], images)
  np.testing.assert_allclose(permuted, expected[:, ::-1], rtol=1e-5, atol=1e-5)


def test_the_key_decides_the_parameters():
  init = jax.jit(_model().init)
  first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first.base["conv1"]["kernel"], other.base["conv1"]["kernel"])
  assert not np.array_equal(first.base["conv1"]["kernel"].ravel(), first.base["conv2"]["kernel"].ravel()[: 9 * 16])


@pytest.mark.parametrize("name, head", [("mlp", "free"), ("cnn_small", "anchored")])
def test_vmap_over_clients_is_a_loop_over_clients(name, head):
  model = _model(name, head)

  def loss(params, images, labels):
    features, taps = model.base(params.base, images)
    chosen = jax.nn.log_softmax(model.head(params.head, features))[jnp.arange(len(labels)), labels]
    return -chosen.mean() + 1e-3 * sum((tap**2).mean() for tap in taps)

  one = jax.jit(jax.value_and_grad(loss))
  init = jax.jit(model.init)
  labels = jnp.array([0, 4, 2, 2])
  clients = [(init(jax.random.key(seed)), _images(seed, 4, *SHAPE), (labels + seed) % 5) for seed in range(3)]
  result = jax.jit(jax.vmap(one))(*jax.tree.map(lambda *rows: np.stack(rows), *clients))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(result))
  expected = jax.tree.map(lambda *rows: np.stack(rows), *[one(*client) for client in clients])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), result, expected)


def test_bfloat16_is_close_to_float32():
  params = jax.jit(_model().init)(jax.random.key(0))
  images = _images(0, 16, *SHAPE)
  exact, rough = (jax.jit(_model(dtype=dtype).base)(params.base, images)[0] for dtype in (jnp.float32, jnp.bfloat16))
  assert 0 < float(jnp.abs(exact - rough).max()) < 0.05 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(
  "arguments, options, words",
  [
    (("cnn", (2, 2, 1), 10), {}, ["cnn", "2 x 2 x 1", "4"]),
    (("resnet", SHAPE, 10), {}, ["resnet", *MODELS]),
    (("mlp", SHAPE, 10), {"head": "linear"}, ["linear", *HEADS]),
    (("mlp", SHAPE, 10), {"head": "anchored"}, ["none", "[10, D]"]),
    (("mlp", SHAPE, 10), {"head": "anchored", "embeddings": np.eye(5)}, ["[5, 5]", "[10, D]"]),
  ],
)
def test_what_does_not_fit_is_said_in_one_line(arguments, options, words):
  with pytest.raises(InputError) as error:
    classifier(*arguments, **options)
  message = str(error.value)
  assert "\n" not in message and all(word in message for word in words)


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 6, 3)])
def test_a_frozen_network_is_the_same_with_the_same_gradient_by_the_images(shape):
  model = classifier("cnn_small", shape, 5)
  params, images = jax.jit(model.init)(jax.random.key(0)), _images(0, 3, *shape)

  def loss(model):
    def of(images):
      features, taps = model.base(params.base, images)
      return jnp.sum(jnp.tanh(model.head(params.head, features))) + sum(jnp.mean(tap**2) for tap in taps), taps

    return jax.jit(jax.value_and_grad(of, has_aux=True))(images)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), loss(model.frozen), loss(model))
