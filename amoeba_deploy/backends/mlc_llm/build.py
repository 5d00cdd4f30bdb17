"""One build: MLC-LLM's three commands in a working folder, each followed by a look at what it really wrote."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from amoeba_deploy.backends.backend import BuildOptions, Step
from amoeba_deploy.backends.mlc_llm.cache import TensorCache, write_float32
from amoeba_deploy.backends.mlc_llm.checks import check_config, check_metadata, check_tensors, check_values
from amoeba_deploy.backends.mlc_llm.formats import FORMATS
from amoeba_deploy.backends.mlc_llm.layout import class_of, source_config, stored_tensors, wanted_settings
from amoeba_deploy.backends.mlc_llm.library import check_library
from amoeba_deploy.backends.mlc_llm.targets import BuildTarget
from amoeba_deploy.backends.mlc_llm.tool import COMMAND, DRIVER, Tool, toolchain
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.extraction.folder import other_files
from amoeba_deploy.files import cache_folder, read_json_object, sha256_of, whole_file, write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import INDEX

CONFIG = "mlc-chat-config.json"
PLAIN = "LM"
"""MLC's conversation template for plain text, which has token 1 before it and stops at 2, whatever the model's are."""
_STEADY = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""TVM orders some expressions by their addresses in memory; with these, and without random addresses, a build repeats
bit by bit on one machine."""


def prefill_chunk(options: BuildOptions) -> int:
    """The most new tokens that go through the model at once."""
    return min(options.number("prefill_chunk"), options.context)


@cache
def _steady_prefix() -> tuple[str, ...]:
    """The command that starts a program without random addresses, where this machine lets it."""
    program = shutil.which("setarch")
    if sys.platform != "linux" or program is None:
        return ()
    prefix = (program, platform.machine(), "-R")
    allowed = subprocess.run([*prefix, sys.executable, "-c", ""], capture_output=True, check=False).returncode == 0
    return prefix if allowed else ()


@dataclass(frozen=True)
class Build:
    """What to build, and the folder to work in."""

    tool: Tool
    model: ModelFolder
    work: Path
    precision: str
    options: BuildOptions
    target: BuildTarget

    @property
    def built(self) -> Path:
        """The folder that MLC fills."""
        return self.work / "built"

    def _run(self, name: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        where = f"on {self.model.path} in {self.precision}"
        self.tool.run(name, arguments, where, self.work, _STEADY | dict(environment or {}), _steady_prefix())

    def convert(self) -> None:
        """The weights, and every tensor of the model checked in them."""
        source, sizes, form = self.work / "source", self.model.architecture, FORMATS[self.precision]
        source.mkdir()
        self.built.mkdir()
        write_json(source / "config.json", source_config(self.model))
        for file in other_files(self.model):
            shutil.copyfile(file, source / file.name)
        index = self.model.path / INDEX
        for file in [*self.model.tensors.files, *([index] if index.is_file() else [])]:
            (source / file.name).symlink_to(file.resolve())
        formats = ["--source", "source", "--source-format", "huggingface-safetensor", "--device", "cpu"]
        self._run("convert_weight", ["source", *self._common(), *formats, "--output", "built"])
        tensors = stored_tensors(sizes)
        check_tensors(TensorCache(self.built), tensors, form, sizes.depth)
        if self.precision == "q0f32":
            write_float32(self.built, self.model, tensors)
        (self.built / "tensor-cache-b16.json").unlink(missing_ok=True)
        check_values(TensorCache(self.built), self.model, tensors, form)

    def configure(self) -> None:
        """``mlc-chat-config.json``, which the library is compiled from, and the tokenizer's files."""
        chunk, options = prefill_chunk(self.options), self.options
        template = options.settings["conv_template"]
        limits = {"context-window-size": options.context, "prefill-chunk-size": chunk, "max-batch-size": options.batch}
        given = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
        self._run("gen_config", ["source", *self._common(), "--conv-template", template, *given, "--output", "built"])
        config = read_json_object(self.built / CONFIG)
        sizes = self.model.architecture
        check_config(config, self.precision, wanted_settings(sizes, options.context, chunk, options.batch))
        if template == PLAIN and isinstance(config.get("conv_template"), dict):
            config["conv_template"] |= self._own_ends()
        for file in self.built.iterdir():
            file.chmod(0o644)
        write_json(self.built / CONFIG, config)

    def compile(self) -> dict[str, Any]:
        """The library; returns facts about it."""
        output = f"built/{self.target.library}"
        kept = self._kept_library()
        if kept is not None and kept.is_file():
            shutil.copyfile(kept, self.work / output)
        else:
            given = [f"built/{CONFIG}", *self._compile_options(), "--output", output]
            self._run("compile", given, self.target.environment)
        try:
            metadata = self._checked(self.work / output)
        except VerificationFailed:
            if kept is not None:
                kept.unlink(missing_ok=True)
            raise
        (self.work / output).chmod(0o644)
        if kept is not None:
            with suppress(BadInput), whole_file(kept, force=True) as file:  # a cache that cannot be written is no loss
                shutil.copyfile(self.work / output, file)
        return {"memory_bytes": max(map(int, metadata.get("memory_usage", {"": 0}).values()), default=0)}

    def _checked(self, library: Path) -> dict[str, Any]:
        metadata = check_library(library, self.target)
        sizes, options = self.model.architecture, self.options
        settings = wanted_settings(sizes, options.context, prefill_chunk(options), options.batch)
        check_metadata(metadata, self.precision, settings, stored_tensors(sizes), FORMATS[self.precision])
        return metadata

    def _kept_library(self) -> Path | None:
        """Where the library of this config, target and versions is kept; None where the versions are not known.

        No weight is in a library, so all checkpoints of one shape share it.
        """
        versions = toolchain().versions
        if not {"tvm", COMMAND} <= versions.keys() or "unknown" in versions.values():
            return None
        config = (self.built / CONFIG).read_text(encoding="utf-8")
        given = [config, self._compile_options(), dict(self.target.environment), versions, self.target.library]
        key = hashlib.sha256(json.dumps([*given, sha256_of(DRIVER)]).encode()).hexdigest()[:32]
        return cache_folder() / "mlc-llm" / key / self.target.library

    def step(self, engine: str) -> Step:
        """What compiles the library on the device, in the bundle's folder."""
        options = self._compile_options()
        output = f"{engine}/{self.target.library}"
        command = (COMMAND, "compile", f"{engine}/{CONFIG}", *options, "--output", output)
        return Step(f"compile the MLC-LLM library for {self.target.chip}", command, f"mlc_llm on {self.target.chip}")

    def _common(self) -> list[str]:
        return ["--quantization", self.precision, "--model-type", class_of(self.model.architecture)]

    def _compile_options(self) -> list[str]:
        return [*self._common(), "--device", self.target.device, "--opt", self.target.optimise]

    def _own_ends(self) -> dict[str, Any]:
        """The model's own begin and end tokens, in place of 1 and 2."""
        config = self.model.config
        begin, ends = config.get("bos_token_id"), config.get("eos_token_id")
        listed = ends if isinstance(ends, list) else [ends]
        return {
            "system_prefix_token_ids": None if begin is None else [begin],
            "stop_token_ids": [end for end in listed if end is not None],
        }
