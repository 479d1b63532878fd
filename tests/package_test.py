"""The package as it is installed and imported, before anything in it is used."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import binaries

ROOT = Path(__file__).parents[1]
HEAVY = ("huggingface_hub", "matplotlib", "pyarrow", "tensorflow", "tensorflow_datasets", "torch", "transformers")


def loaded_by(code: str) -> set[str]:
  """Top-level modules loaded by `code` where no device may be touched: starting a backend of this name fails."""
  result = subprocess.run(
    [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "no_such_backend"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return {name.partition(".")[0] for name in result.stdout.split()}


def test_the_probe_notices_a_device():
  with pytest.raises(AssertionError, match="no_such_backend"):
    loaded_by("import jax; jax.devices()")


def test_methods_and_wrappers_have_names_of_their_own():
  from apfl_jax import algorithms

  assert not set(algorithms.METHODS) & set(algorithms.WRAPPERS)  # their settings are flags under these names


def test_import_is_light():
  assert loaded_by("import apfl_jax").isdisjoint({*HEAVY, "orbax"})


def test_no_module_loads_what_only_some_runs_need_or_touches_a_device():
  code = """
import importlib, pkgutil, apfl_jax
for module in pkgutil.walk_packages(apfl_jax.__path__, "apfl_jax."):
  importlib.import_module(module.name)
"""
  loaded = loaded_by(code)
  assert "jax" in loaded
  assert loaded.isdisjoint(HEAVY)


def test_what_is_forked_for_binaries_has_touched_no_device():
  loaded = loaded_by(f"import {', '.join(binaries.PRELOADED)}")
  assert "jax" in loaded
  assert "matplotlib" not in loaded  # there is a test of a run without it


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path, monkeypatch):
  build = pytest.importorskip("hatchling.build", reason="needs hatchling, of the extra `test`")
  monkeypatch.chdir(ROOT)
  with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
  sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "apfl_jax").rglob("*.*")}
  wanted = {name for name in sources if name.endswith((".py", ".npz", ".csv", ".md", "/py.typed"))}
  assert names == wanted
  assert "apfl_jax/py.typed" in names
