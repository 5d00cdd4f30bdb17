"""Stage 1 on a Ray cluster: the same selection to the last bit, and refusals in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import QUIET

from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.selection import Selection, write_selection
from amoeba_deploy.stage1.calibration import Calibration, read_calibration
from amoeba_deploy.stage1.cluster import Cluster, shares
from amoeba_deploy.stage1.lanes import processors
from amoeba_deploy.stage1.pipeline import Settings, select

ray = pytest.importorskip("ray")

TEXT = EMBEDDED.parent / "validation.txt"
LITTLE = Settings(samples=3, sequence=400, minimum_depth=11)
"""Two batches: one a worker."""


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    """A Ray of this machine with two processors, which the tests share; nothing of it is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()


def written(selection: Selection, folder: Path) -> bytes:
    """The bytes of the safetensors file."""
    folder.mkdir()
    write_selection(folder, selection)
    return (folder / "selection.safetensors").read_bytes()


def chosen(model: ModelFolder, **changes: Any) -> Selection:
    return select(model, TEXT, replace(LITTLE, **changes), progress=QUIET)


def opened(model: ModelFolder, count: int) -> Cluster:
    """Workers for a little text, which are not started yet."""
    data: Calibration = read_calibration(str(TEXT), model.tokenizer(), 512, samples=1, sequence=32)
    return Cluster(model, data, data, count=count, offload=False, memory=10**9)


def ray_processes() -> list[str]:
    """Processes that Ray started below this one and that still run."""
    below = psutil.Process().children(recursive=True)
    return [p.name() for p in below if p.status() != psutil.STATUS_ZOMBIE and "ray" in " ".join(p.cmdline())]


def test_work_is_shared_out_in_neighbouring_runs_as_even_as_can_be() -> None:
    assert shares(7, 3) == [range(2), range(2, 4), range(4, 7)]
    assert shares(4, 4) == [range(i, i + 1) for i in range(4)]
    assert [len(part) for part in shares(1, 2)] == [0, 1]


@pytest.mark.skipif(processors() < 2, reason="two workers need two processors")
def test_two_workers_on_a_ray_of_their_own_give_the_same_files_and_leave_nothing(
    demo: Checkpoint, tmp_path: Path
) -> None:
    spread = chosen(demo.model, workers=2)
    assert not ray.is_initialized()
    assert ray_processes() == []
    here = chosen(demo.model)
    assert spread.depths == here.depths
    assert written(spread, tmp_path / "spread") == written(here, tmp_path / "here")


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 1, "sequence": 64},
        {"samples": 2, "sequence": 32, "units": "sublayer", "beam": 2, "offload": True},
        {"samples": 3, "sequence": 32, "depth_method": "shortened-ppl", "width_method": "wanda"},
    ],
    ids=["fewer batches than workers", "sublayers, a beam, from disk", "one shot"],
)
def test_two_workers_give_the_same_selection_by_every_way(
    changes: dict[str, Any], demo: Checkpoint, tmp_path: Path
) -> None:
    spread, here = chosen(demo.model, workers=2, **changes), chosen(demo.model, **changes)
    assert spread.depths == here.depths
    assert written(spread, tmp_path / "spread") == written(here, tmp_path / "here")
    assert spread.facts["evaluations"] == here.facts["evaluations"]


@pytest.mark.usefixtures("running")
def test_questions_are_answered_by_workers_as_here(demo: Checkpoint) -> None:
    found = [
        select(
            demo.model,
            EMBEDDED.parent / "questions.jsonl",
            Settings(samples=16, metric="choice-loss", minimum_depth=11, workers=workers),
            progress=QUIET,
        )
        for workers in (None, 2)
    ]
    assert found[0].depths == found[1].depths


@pytest.mark.usefixtures("running")
def test_more_workers_than_processors_are_refused(demo: Checkpoint) -> None:
    with pytest.raises(BadInput, match=r"--workers ray:3 asks for more workers than the cluster's 2 processors"):
        opened(demo.model, 3).__enter__()


@pytest.mark.usefixtures("running")
def test_no_number_of_workers_is_one_on_each_machine(demo: Checkpoint) -> None:
    with opened(demo.model, 0) as cluster:
        assert len(cluster.workers) == 1
    assert cluster.workers == []


@pytest.mark.usefixtures("running")
def test_a_worker_that_finds_another_model_at_the_path_is_refused(demo: Checkpoint, tmp_path: Path) -> None:
    model = ModelFolder(Path(shutil.copytree(demo.model.path, tmp_path / "model")))
    assert model.digest == demo.model.digest
    config = model.path / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(BadInput, match="holds another model on a worker's machine; put the same one there") as caught:
        opened(model, 2).__enter__()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("running")
def test_workers_report_weights_that_are_no_numbers_by_the_removed_blocks(demo: Checkpoint, tmp_path: Path) -> None:
    import numpy as np
    from conftest import save_random_model
    from safetensors.numpy import load_file, save_file

    model = save_random_model(tmp_path / "model", "llama", vocab_size=1024)
    shutil.copy(demo.model.path / "tokenizer.json", model.path)
    tensors = load_file(model.path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][:] = np.nan
    save_file(tensors, model.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="the full model gives logits that are not finite"):
        chosen(ModelFolder(model.path), workers=2, samples=2, sequence=32, minimum_depth=2)
