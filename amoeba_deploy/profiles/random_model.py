"""Random weights of a model's config: what profiling lowers where there is no checkpoint.

Latency follows from sizes and dtypes, not from what the weights are, so a shape space can be measured from a config
alone. The weights are never held: a ``RandomModel`` stands where extraction reads a base model, and gives any bytes of
any tensor from one block of a few megabytes, repeated. That is faster than a disk reads, and the folder written is what
extraction writes of a real checkpoint: the same class, config, tensors and layouts. There is no tokenizer in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import extract, model_dtype
from amoeba_deploy.extraction.ragged import refuse_ragged
from amoeba_deploy.families import family_of, read_architecture
from amoeba_deploy.model_folder import ModelFolder, read_config
from amoeba_deploy.plan import Plan, Steps, block_plan
from amoeba_deploy.shape import Shape
from amoeba_deploy.tensors import CONFIG_DTYPES, NUMPY_OF, Array, OpenFile, Part, TensorFolder, TensorInfo, from_float32

DEVIATION = 0.02
"""Standard deviation of the weights: small enough that activations stay finite in float16, block after block."""
_VALUES = 1_999_993
"""Values in the block that is repeated: a prime, so that the rows of a matrix begin at different places in it."""
_PART_BYTES = 1 << 20
_NORMS, _WEIGHTS = Path("norms"), Path("weights")
"""Stand in the place of files: which of the two kinds of values a tensor has."""


class _Repeated(OpenFile):
    """Stands in the place of an open file: any place holds the next bytes of a block that repeats without end."""

    def __init__(self, path: Path, block: Array) -> None:
        self.path = path
        self._block = block.view(np.uint8)

    def read_into(self, buffer: Array, offset: int) -> None:
        view, done = buffer.reshape(-1).view(np.uint8), 0
        while done < len(view):
            begin = (offset + done) % len(self._block)
            part = self._block[begin : begin + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)


class RandomTensors(TensorFolder):
    """Tensors of some shapes that no file holds: normal of ``DEVIATION``, and ones in norms."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> None:
        """``dtype`` as safetensors spells it; the same seed gives the same values."""
        self.folder, self.files, self.infos = folder, [], {}
        offset = 0
        for name, shape in shapes.items():
            length = int(np.prod(shape)) * np.dtype(NUMPY_OF[dtype]).itemsize
            kind = _NORMS if "norm" in name else _WEIGHTS
            self.infos[name] = TensorInfo(kind, dtype, shape, offset, length)
            offset += length
        normal = np.random.default_rng(seed).standard_normal(_VALUES, np.float32) * np.float32(DEVIATION)
        self._sources = {
            _WEIGHTS: _Repeated(_WEIGHTS, from_float32(normal, dtype)),
            _NORMS: _Repeated(_NORMS, from_float32(np.ones(1, np.float32), dtype)),
        }

    def raw(self, name: str) -> Array:
        info = self.info(name)
        found: Array = np.empty(info.shape, NUMPY_OF[info.dtype])
        self.file(info).read_into(found, info.offset)
        return found

    def file(self, info: TensorInfo) -> OpenFile:
        return self._sources[info.file]

    def whole(self, info: TensorInfo) -> Iterator[Part]:
        buffer = np.empty(min(_PART_BYTES, info.length), np.uint8)
        for done in range(0, info.length, _PART_BYTES):
            part = buffer[: info.length - done]
            self.file(info).read_into(part, info.offset + done)
            yield part


class RandomModel(ModelFolder):
    """A model of which only the config exists; its weights are random, in the dtype that the config names."""

    def __init__(self, config: Path, seed: int = 0) -> None:
        """Read a ``config.json``, or a folder's; nothing else of the folder is read.

        Raises:
            BadInput: it is no config of a known family, or of a dtype that is not written.
        """
        self.path = config if config.is_dir() else config.parent
        self.config = read_config(config)
        refuse_ragged(self.config, config)
        self.family, self.architecture, self.blocks = family_of(self.config), read_architecture(self.config), None
        dtype = model_dtype(self)
        if dtype not in CONFIG_DTYPES:
            raise BadInput(f"{config}: has the dtype '{dtype:.40}', which is none of {', '.join(CONFIG_DTYPES)}")
        self.tensors = RandomTensors(self.path, self.tensor_shapes(), CONFIG_DTYPES[dtype], seed)

    def tokenizer_files(self) -> list[Path]:
        """None: measuring feeds ids, and what lies beside a config need not be of its vocabulary."""
        return []


def first_units(architecture: Architecture, shape: Shape, steps: Steps) -> Plan:
    """The plan of a uniform shape that keeps the first blocks, heads and neurons: of random ones all are as good.

    Raises:
        BadInput: the shape is deeper than the model.
    """
    if shape.depth > architecture.depth:
        raise BadInput(f"the shape {shape} asks for {shape.depth} blocks; the model has {architecture.depth}")
    groups, neurons = steps.kept(architecture, shape.width, shape.width)
    blocks = (block_plan(architecture, index, range(groups), range(neurons)) for index in range(shape.depth))
    return Plan(shape, tuple(blocks))


def random_subnet(config: Path, shape: Shape, steps: Steps, output: Path, seed: int = 0) -> ModelFolder:
    """Write the dense folder of a shape with random weights into an existing, empty folder, in the config's dtype.

    Args:
        config: a ``config.json``, or the folder of one.
        shape: what to keep of the model.
        steps: the numbers of heads and neurons that the engine takes.
        output: the folder to fill.
        seed: the same one gives the same bytes.

    Raises:
        BadInput: the shape is none of the model's, or no stock class holds it.
    """
    model = RandomModel(config, seed)
    extract(model, first_units(model.architecture, shape, steps), output)
    return ModelFolder(output)
