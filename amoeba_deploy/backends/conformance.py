"""The test suite that every backend must pass. A backend's test file derives a class from ``Conformance``.

.. code-block:: python

    class TestName(Conformance):
        flow = "name"

The models are small, random and made here, of sizes that suit engines with rules: head size 64, hidden 128, neurons in
multiples of 256. A backend that cannot run here is tested for what it refuses and writes; pytest says by name what was
skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.backend import Backend, BuildOptions, Engine, Ids, options_for
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import Array, TensorInfo
from amoeba_deploy.verification import verify_artefact

CONTEXT = 128
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def random_llama(folder: Path, **changes: Any) -> ModelFolder:
    """A random Llama in float32; norms are random too, so that none can be forgotten unseen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(SIZES | changes)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.08 * noise)
    model.save_pretrained(folder)
    return ModelFolder(folder)


def fed(engine: Engine, ids: Ids, first: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of ids [batch, n]: ``first`` of them at once, the others one by one."""
    engine.reset()
    parts = [engine.feed(ids[:, :first])] + [engine.feed(ids[:, i : i + 1]) for i in range(first, ids.shape[1])]
    return np.concatenate(parts, axis=1)


def _swap_gate_and_up(model: ModelFolder) -> Callable[[str, TensorInfo], Array]:
    def values(name: str, _info: TensorInfo) -> Array:
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        for own, swapped in other.items():
            if own in name:
                return model.tensors.float32(name.replace(own, swapped))
        return model.tensors.float32(name)

    return values


def _shift_heads(model: ModelFolder) -> Callable[[str, TensorInfo], Array]:
    def values(name: str, _info: TensorInfo) -> Array:
        found = model.tensors.float32(name)
        return np.roll(found, model.architecture.head_dim, axis=0) if "q_proj.weight" in name else found

    return values


def _same(model: ModelFolder) -> Callable[[str, TensorInfo], Array]:
    return lambda name, _info: model.tensors.float32(name)


def _other_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 500.0
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(config))


_PLANTS: dict[
    str, tuple[Callable[[ModelFolder], Callable[[str, TensorInfo], Array]], Callable[[Path], None] | None]
] = {
    "gate and up swapped": (_swap_gate_and_up, None),
    "heads off by one": (_shift_heads, None),
    "another rotary base": (_same, _other_rope),
}
"""Mistakes that an exporter makes: how weights, and then the folder, are changed before lowering."""


class Conformance:
    """What every backend must do. Set ``flow``; narrow ``run_precisions`` where all of them take too long."""

    flow: ClassVar[str]
    run_precisions: ClassVar[tuple[str, ...] | None] = None
    """The precisions that are built and run; all where None."""
    architecture_changes: ClassVar[dict[str, Any]] = {}
    """Changes to ``SIZES`` that the engine needs."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
        """The random model that is lowered."""
        return random_llama(tmp_path_factory.mktemp("conformance") / "model", **cls.architecture_changes)

    @property
    def backend(self) -> Backend:
        """The backend under test."""
        return load_backend(self.flow)

    @property
    def options(self) -> BuildOptions:
        """What it is built with."""
        return options_for(self.backend, CONTEXT)

    def precisions(self) -> Iterator[str]:
        """The precisions to run here; skips the test where none does."""
        if self.backend.toolchain().missing:
            pytest.skip(f"{self.flow} needs {', '.join(self.backend.toolchain().missing)}")
        reasons = []
        count = 0
        for precision in self.run_precisions or self.backend.precisions():
            reason = self.backend.cannot_run(precision, self.options)
            if reason:
                reasons.append(reason)
                continue
            count += 1
            yield precision
        if not count:
            pytest.skip(f"{self.flow} does not run here: {reasons[0]}")

    def lowered(self, model: ModelFolder, folder: Path, precision: str) -> Path:
        """The artefact of a model; a model whose weights are used in place is copied into the artefact's folder."""
        folder.mkdir(exist_ok=True)
        dtype = self.backend.folder_dtype(precision, self.options)
        if dtype:
            copy_model(model, folder, dtype)
            model = ModelFolder(folder)
        self.backend.lower(model, folder, precision, self.options)
        return folder

    def test_it_is_known_by_its_name(self) -> None:
        assert self.flow in flow_names()
        assert self.backend.flow == self.backend.takes.flow == self.flow

    def test_its_precisions_have_storage_and_tolerances(self) -> None:
        assert self.backend.precisions()
        for precision in self.backend.precisions():
            storage = self.backend.storage(precision)
            assert 0 < storage.matrix_bits <= 32
            assert storage.cache_bytes > 0
            assert 0 < self.backend.tolerance(precision) < 1
            assert 0 < self.backend.allowed_rise(precision) <= 1
        for stands_for in self.backend.takes.aliases.values():
            assert stands_for in self.backend.precisions()

    def test_its_toolchain_says_what_is_there_and_how_to_get_the_rest(self) -> None:
        toolchain = self.backend.toolchain()
        assert toolchain.install
        assert not set(toolchain.versions) & set(toolchain.missing)

    def test_its_identity_names_what_binds_an_engine(self) -> None:
        for precision in self.backend.precisions():
            identity = self.backend.identity(precision, self.options).to_json()
            assert identity["precision"] == precision
            assert identity["context"] == CONTEXT
            assert set(identity["bound"]) <= set(identity["versions"])
            assert json.loads(json.dumps(identity)) == identity

    def test_a_setting_that_it_does_not_have_is_refused_by_name(self) -> None:
        with pytest.raises(BadInput, match="no setting 'nonsense'"):
            options_for(self.backend, CONTEXT, settings={"nonsense": "1"})

    def test_a_precision_that_it_does_not_have_is_refused(self, model: ModelFolder, tmp_path: Path) -> None:
        with pytest.raises(AmoebaError, match="no precision 'fp7'"):
            self.backend.lower(model, tmp_path, "fp7", self.options)
        assert list(tmp_path.iterdir()) == []

    def test_a_model_with_something_unknown_is_refused_before_anything_is_written(
        self, model: ModelFolder, tmp_path: Path
    ) -> None:
        takes, sizes = self.backend.takes, model.architecture
        assert self.backend.refusal(sizes, self.backend.precisions()[0], self.options) is None
        if takes.any_trait:
            return
        odd = replace(sizes, traits=("something unheard of",))
        refused = self.backend.refusal(odd, self.backend.precisions()[0], self.options)
        assert refused is not None
        assert "something unheard of" in refused

    def test_it_computes_what_transformers_computes_in_every_precision(
        self, model: ModelFolder, tmp_path: Path
    ) -> None:
        for precision in self.precisions():
            artefact = self.lowered(model, tmp_path / precision, precision)
            result = verify_artefact(self.backend, model, artefact, precision, self.options)
            assert result.passed
            assert result.perplexity is not None

    def test_a_prompt_in_pieces_and_a_second_prompt_give_the_same(self, model: ModelFolder, tmp_path: Path) -> None:
        ids = np.random.default_rng(3).integers(0, model.architecture.vocabulary, (1, 24))
        for precision in self.precisions():
            engine = self.backend.open(self.lowered(model, tmp_path / precision, precision), precision, context=CONTEXT)
            whole = fed(engine, ids, 24)
            assert whole.shape == (1, 24, model.architecture.vocabulary)
            assert whole.dtype == np.float32
            limit = max(2 * self.backend.tolerance(precision), 1e-4) * float(np.abs(whole).max())
            for first in (13, 1):
                assert np.abs(fed(engine, ids, first) - whole).max() < limit
            fed(engine, ids[:, ::-1].copy(), 24)
            # The same work in the same order: nothing of what was fed before may be left.
            assert np.abs(fed(engine, ids, 24) - whole).max() < limit

    def test_the_same_model_gives_the_same_bytes(self, model: ModelFolder, tmp_path: Path) -> None:
        for precision in self.precisions():
            folders = [self.lowered(model, tmp_path / f"{precision}-{i}", precision) for i in range(2)]
            names = [sorted(f.relative_to(folder) for f in folder.rglob("*") if f.is_file()) for folder in folders]
            assert names[0] == names[1]
            for name in names[0]:
                assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name

    @pytest.mark.parametrize("plant", _PLANTS)
    def test_a_planted_mistake_is_caught(self, plant: str, model: ModelFolder, tmp_path: Path) -> None:
        change, finish = _PLANTS[plant]
        spoilt = tmp_path / "spoilt"
        spoilt.mkdir()
        copy_model(model, spoilt, "float32", change(model))
        if finish is not None:
            finish(spoilt)
        for precision in self.precisions():
            artefact = self.lowered(ModelFolder(spoilt), tmp_path / precision, precision)
            with pytest.raises(VerificationFailed, match="is wrong"):
                verify_artefact(self.backend, model, artefact, precision, self.options)

    def test_a_folder_without_its_artefact_is_refused(self, tmp_path: Path) -> None:
        for precision in self.precisions():
            with pytest.raises(BadInput, match=str(tmp_path)):
                self.backend.open(tmp_path, precision)
