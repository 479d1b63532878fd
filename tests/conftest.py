"""What every test shares. JAX reads its settings from the environment, which programs under test inherit."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
  """Runs before any test module imports JAX."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  if config.pluginmanager.has_plugin("cacheprovider"):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """With `-n`, tests that share what they compile stay together: those of a method, else those of a module."""
  for item in items:
    method = getattr(item, "callspec", None) and item.callspec.params.get("name")  # type: ignore[attr-defined]
    common = item.path.name in ("common_test.py", "vmap_test.py")
    item.add_marker(pytest.mark.xdist_group(f"method {method}" if common else item.path.name))


@pytest.fixture(scope="session")
def tfds_dir() -> Path:
  """The folder of prepared data sets, `data_dir` of tensorflow-datasets."""
  folder = Path(os.environ.get("APFL_JAX_TFDS", ROOT.parent / "shared" / "tfds"))
  if not folder.is_dir():
    pytest.skip(f"needs prepared data sets: no folder {folder}; name another with APFL_JAX_TFDS")
  return folder
