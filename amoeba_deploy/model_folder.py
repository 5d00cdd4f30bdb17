"""A model as Hugging Face folders hold it: config, weights in safetensors, tokenizer files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.ragged import (
    block_tensors,
    has_output_bias,
    is_ragged,
    read_block_sizes,
    require_own_file,
)
from amoeba_deploy.families import family_of, read_architecture
from amoeba_deploy.families.family import Family
from amoeba_deploy.files import read_json_object, require_inside, sha256_of
from amoeba_deploy.quiet import quiet_imports
from amoeba_deploy.tensors import CONFIG_DTYPES, INDEX, TensorFolder, as_float32

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
MORE_TEMPLATES = "additional_chat_templates"
"""The folder of chat templates beside the default one, as transformers writes them."""


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json``, given by its own path or by its folder's; raises BadInput where it is not one."""
    return read_json_object(path / "config.json" if path.is_dir() else path)


def resolve_config(name: str) -> Path:
    """The file of a config: its own path, that of a folder with a ``config.json``, or a hub id.

    Of the hub's model nothing but its config is downloaded.

    Raises:
        BadInput: there is no such file or folder, and the hub gives none of that name.
    """
    path = Path(name)
    if path.is_dir():
        return path / "config.json"
    if path.is_file() or not _is_hub_id(name):
        return path
    from huggingface_hub import hf_hub_download

    with _hub_answers(name):
        return Path(hf_hub_download(name, "config.json"))


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".json")


@contextmanager
def _hub_answers(name: str) -> Iterator[None]:
    """The block asks the hub for a model; raises BadInput where it does not get it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(f"{name}: is no folder here, and the hub did not give it ({reason})") from None


def resolve_model(name: str) -> Path:
    """The local folder of a model: a path as it is, or a hub id's snapshot, downloaded where it is not cached."""
    if Path(name).is_dir():
        return Path(name)
    if not _is_hub_id(name):
        raise BadInput(f"{name}: is neither a folder nor a hub id such as org/model")
    from huggingface_hub import snapshot_download

    with _hub_answers(name):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


class ModelFolder:
    """A dense model on disk. Headers and sizes are checked when it is opened; weights are read only when asked for."""

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            BadInput: config or weights are missing or damaged, or a tensor's shape contradicts the config.
        """
        if not path.is_dir():
            raise BadInput(f"{path}: is not a model folder")
        self.path = path
        self.config = read_config(path)
        self.family: Family = family_of(self.config)
        self.architecture: Architecture = read_architecture(self.config)
        self.blocks = read_block_sizes(self.config, self.architecture.depth) if is_ragged(self.config) else None
        """The sizes of each block of a ragged subnet; None where all blocks have those of the architecture."""
        self.tensors = TensorFolder(path)
        beside = [path / name for name in ("config.json", "generation_config.json", "README.md", INDEX)]
        require_inside(path, [*beside, *self.tensors.files, *self.tokenizer_files()])

    def block_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Names (after ``model.layers.{i}.``) and shapes of all tensors of a block, in the order they are written."""
        sizes = self.architecture
        axes = self.family.block_tensors(sizes)
        if self.blocks is not None:
            block = self.blocks[index]
            axes = block_tensors(self.family, sizes, block, has_output_bias(self.config))
            sizes = block.of(sizes)
        return {name: tuple(sizes.extent(axis) for axis in tensor) for name, tensor in axes.items()}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors that the config implies."""
        sizes = self.architecture
        found: dict[str, tuple[int, ...]] = {
            name: (sizes.hidden,) if "norm" in name else (sizes.vocabulary, sizes.hidden)
            for name in self.family.other_tensors(sizes)
        }
        for index in range(sizes.depth):
            found |= {f"model.layers.{index}.{name}": shape for name, shape in self.block_shapes(index).items()}
        return found

    def check_shapes(self) -> None:
        """Raise BadInput where a tensor is missing or is not of the shape that the config implies."""
        for name, shape in self.tensor_shapes().items():
            found = self.tensors.info(name)
            if found.shape != shape:
                raise BadInput(
                    f"{self.path}: tensor '{name}' is {list(found.shape)}, its config calls for {list(shape)}"
                )
            if found.dtype not in CONFIG_DTYPES.values():
                raise BadInput(
                    f"{self.path}: tensor '{name}' holds {found.dtype}, where weights in F32, F16 or BF16 belong; "
                    f"get or convert the model in one of them"
                )

    def block_matrix(self, index: int, name: str) -> NDArray[np.float32]:
        """A matrix [out, in] of the common block, such as ``mlp.gate_proj``, also where it is fused with others."""
        tensor, rows = self.family.matrix_rows(self.architecture, name)
        whole = f"model.layers.{index}.{tensor}"
        if name not in self.family.fused:
            return self.tensors.float32(whole)
        return as_float32(self.tensors.raw(whole)[rows], self.tensors.info(whole).dtype)

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and contents of config, weights and tokenizer: what makes it this model."""
        files = [self.path / "config.json", *self.tensors.files, *self.tokenizer_files()]
        named = {file.relative_to(self.path).as_posix(): file for file in files}
        lines = [f"{name} {sha256_of(file)}\n" for name, file in sorted(named.items())]
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files that the folder has, chat templates too."""
        found = [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]
        return found + sorted((self.path / MORE_TEMPLATES).glob("*.jinja"))

    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer (tokenizers library); raises BadInput where there is none."""
        return load_tokenizer(self.path)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The ``tokenizer.json`` of a folder; raises BadInput where there is none, or it is damaged."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BadInput(f"{folder}: has no tokenizer.json, which reading and writing text needs")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{file}: is not a tokenizer ({error})") from None


def load_torch_model(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """The folder as a transformers model for inference, on the CPU, with no remote code and no network.

    Of a ragged subnet the modelling file of this package is run, not the folder's, which must be the same.
    """
    quiet_imports()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    config = read_config(folder)
    if is_ragged(config):
        from amoeba_deploy.extraction.modeling_amoeba import AmoebaRaggedForCausalLM

        require_own_file(folder, config)
        loader = AmoebaRaggedForCausalLM
    model: PreTrainedModel = loader.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=False, local_files_only=True
    )
    return model.eval()
