"""The state of an unfinished tuning run: what is resumed is what was saved, or nothing is."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET
from safetensors.torch import load_file

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object, write_json
from amoeba_deploy.progress import Progress
from amoeba_deploy.stage2.saved import SavedRun, latest_state, read_state, run_folder

SETTINGS: dict[str, Any] = {"steps": 100, "lr": 2e-4, "top_k": 2, "widths": [1, 0.75], "base model": "sha256:ab"}


def begin(folder: Path, *, resume: bool = False, force: bool = False, **changes: Any) -> SavedRun:
    return SavedRun.begin(folder, SETTINGS | changes, resume=resume, force=force, progress=QUIET)


def state(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of every kind that a run has: experts, moments, steps, random states."""
    torch.manual_seed(seed)
    return {
        "blocks.0.q_proj.lora_a": torch.nn.Parameter(torch.randn(5, 4, 7)),
        "blocks.0.q_proj.lora_b": torch.randn(5, 9, 4).bfloat16(),
        "moments": torch.randn(6, 8).half().T,  # not contiguous
        "wide": torch.randn(3).double(),
        "step": torch.tensor(seed),
        "scale": torch.tensor(0.1),
        "nothing": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "counts": torch.arange(4, dtype=torch.int32),
        "generator": torch.get_rng_state(),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, raw.numpy().tobytes()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return [(n, bits(t)) for n, t in found.items()] == [(n, bits(t)) for n, t in wanted.items()]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def state_file(folder: Path, step: int) -> Path:
    return folder / f"state-{step:08d}.safetensors"


def test_the_folder_lies_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder(Path("made/tuned")) == tmp_path / "made" / "tuned.tuning"
    assert run_folder(Path("made/llama-3.2")) == tmp_path / "made" / "llama-3.2.tuning"


def test_a_run_goes_on_from_what_it_saved_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with begin(folder) as run:
        assert run.latest() is None
        run.write(10, state(1))
        run.write(20, state(2))
    with begin(folder, resume=True) as run:
        found = run.latest()
    assert found is not None
    step, tensors = found
    assert step == 20
    assert same(tensors, state(2))
    tensors["scale"] += 1  # may be written to


def test_the_same_state_is_the_same_bytes_and_any_reader_reads_it(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run.write(7, state(1))
        first = state_file(run.folder, 7).read_bytes()
        run.write(7, state(1))
        assert state_file(run.folder, 7).read_bytes() == first
    found = load_file(state_file(tmp_path / "run", 7))
    assert found.pop("sha256").shape == (32,)
    assert same(dict(sorted(found.items())), dict(sorted(state(1).items())))


def test_the_last_two_states_are_kept(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        for step in (5, 10, 99_999_999, 100_000_000):
            run.write(step, {"step": torch.tensor(step)})
    kept = [state_file(tmp_path / "run", step).name for step in (99_999_999, 100_000_000)]
    assert names(tmp_path / "run") == sorted(["lock", "run.json", *kept])
    found = latest_state(tmp_path / "run", QUIET)
    assert found is not None
    assert found[0] == 100_000_000


def damage(file: Path, how: str) -> None:
    """Do to a file what crashes and disks do."""
    content = bytearray(file.read_bytes())
    if how == "bit":
        place = random.Random(0).randrange(len(content) - 400, len(content))
        content[place] ^= 4
    else:
        del content[int(how) :]
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["0", "7", "8", "200", "-1", "-32", "-33", "-3000", "bit"])
def test_a_damaged_state_is_passed_over(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with begin(tmp_path / "run") as run:
        run.write(10, state(1))
        run.write(20, state(2))
    damage(state_file(tmp_path / "run", 20), how)
    with SavedRun.begin(tmp_path / "run", SETTINGS, resume=True, force=False, progress=Progress()) as run:
        found = run.latest()
        assert found is not None
        assert found[0] == 10
        assert same(found[1], state(1))
        said = capsys.readouterr().err
        assert "state-00000020" in said
        assert said.endswith("the run goes on from step 10\n")
        run.write(15, state(3))
        assert [name for name in names(run.folder) if name.startswith("state")] == [
            state_file(run.folder, step).name for step in (10, 15)
        ]
        for step in (10, 15):
            damage(state_file(run.folder, step), how)
        with pytest.raises(BadInput, match="no older state is whole; begin again with --force"):
            run.latest()


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run.write(3, {"a": torch.arange(3, dtype=torch.bfloat16), "b": torch.tensor(1)})
    file = state_file(tmp_path / "run", 3)
    whole = file.read_bytes()
    _, wanted = read_state(file)
    for place in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            file.write_bytes(content)
            try:
                step, found = read_state(file)
            except BadInput:
                continue
            assert step == 3  # a bit without meaning, as in the header's padding
            assert same(found, wanted)


def test_a_state_is_of_the_step_in_its_name(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run.write(3, state(1))
    state_file(tmp_path / "run", 3).rename(state_file(tmp_path / "run", 4))
    with pytest.raises(BadInput, match="is not the state that its name says"):
        read_state(state_file(tmp_path / "run", 4))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from amoeba_deploy.progress import Progress\n"
        "from amoeba_deploy.stage2.saved import SavedRun\n"
        f"run = SavedRun.begin(Path({str(folder)!r}), {SETTINGS!r}, resume=False, force=False, progress=Progress())\n"
        "run.write(10, {'a': torch.ones(3)})\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run.write(20, {'a': torch.zeros(3)})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(name.endswith(".part") for name in names(folder))
    assert latest_state(folder, QUIET) is not None
    with begin(folder, resume=True) as run:
        found = run.latest()
        assert names(folder) == ["lock", "run.json", "state-00000010.safetensors"]
    assert found is not None
    assert found[0] == 10
    assert found[1]["a"].tolist() == [1, 1, 1]


def test_a_full_disk_leaves_the_states_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with begin(tmp_path / "run") as run:
        run.write(10, state(1))
        run.write(20, state(2))

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(BadInput, match="No space left on device"):
            run.write(30, state(3))
    assert names(tmp_path / "run") == [
        "lock",
        "run.json",
        "state-00000010.safetensors",
        "state-00000020.safetensors",
    ]


def test_an_unfinished_run_is_not_lost_unasked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with begin(folder) as run:
        run.write(20, state(1))
        run.log.write_text("{}\n")
    with pytest.raises(BadInput, match=r"an unfinished run of step 20; go on with --resume, or --force to begin again"):
        begin(folder)
    with begin(folder, force=True, lr=1e-3) as run:
        assert run.latest() is None
        assert names(folder) == ["lock", "run.json"]
    assert read_json_object(folder / "run.json")["settings"]["lr"] == 1e-3


def test_a_run_without_a_state_has_nothing_to_lose(tmp_path: Path) -> None:
    begin(tmp_path / "run").close()
    with begin(tmp_path / "run", lr=1e-3) as run:
        assert read_json_object(run.folder / "run.json")["settings"]["lr"] == 1e-3


def test_resuming_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SavedRun.begin(tmp_path / "run", SETTINGS, resume=True, force=False, progress=Progress()) as run:
        assert "holds no unfinished run to resume; beginning one" in capsys.readouterr().err
        assert run.latest() is None
        run.write(1, state(1))
    begin(tmp_path / "run", resume=True).close()


def test_settings_must_be_those_of_the_beginning(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run.write(1, state(1))
    begin(tmp_path / "run", resume=True, widths=(1, 0.75)).close()  # equal when written as JSON
    changed = {"lr": 3e-4, "top_k": 3, "policy": "adaptive", "base model": "sha256:cd"}
    with pytest.raises(BadInput) as refused:
        begin(tmp_path / "run", resume=True, **changed)
    for part in (
        "--lr is 0.0003 where the run was begun with 0.0002, ",
        "--top-k is 3 where the run was begun with 2",
        "--policy is adaptive where the run was begun with nothing",
        "base model is sha256:cd where the run was begun with sha256:ab",
    ):
        assert part in str(refused.value)
    assert "widths" not in str(refused.value)


def test_another_version_does_not_go_on(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run.write(1, state(1))
    head = read_json_object(tmp_path / "run" / "run.json")
    write_json(tmp_path / "run" / "run.json", head | {"tool": "amoeba-deploy 0.0.1"})
    with pytest.raises(BadInput, match=r"begun by amoeba-deploy 0\.0\.1 and this is"):
        begin(tmp_path / "run", resume=True)
    begin(tmp_path / "run", force=True).close()


@pytest.mark.parametrize("force", [False, True])
def test_folders_of_others_are_left_alone(force: bool, tmp_path: Path) -> None:
    theirs = tmp_path / "run"
    theirs.mkdir()
    (theirs / "state-00000001.safetensors").write_text("theirs")
    with pytest.raises(BadInput, match=r"holds state-00000001\.safetensors and no run of amoeba tune"):
        begin(theirs, force=force)
    (theirs / "run.json").write_text('{"format": "another/1"}')
    with pytest.raises(BadInput, match="move the folder away"):
        begin(theirs, force=force)
    assert names(theirs) == ["run.json", "state-00000001.safetensors"]
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(BadInput, match="is a file"):
        begin(tmp_path / "file", force=force)


def test_a_finished_run_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    for extra in (False, True):
        with begin(tmp_path / "run") as run:
            run.write(1, state(1))
            run.log.write_text("{}\n")
            if extra:
                (run.folder / "notes.txt").write_text("mine")
            run.remove()
        assert (names(tmp_path / "run") if extra else (tmp_path / "run").exists()) == (
            ["notes.txt"] if extra else False
        )


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from amoeba_deploy.progress import Progress\n"
        "from amoeba_deploy.stage2.saved import SavedRun\n"
        f"run = SavedRun.begin(Path({str(folder)!r}), {{}}, resume=False, force=False, progress=Progress())\n"
        "print('begun', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        for how in ({}, {"force": True}, {"resume": True}):
            with pytest.raises(BadInput, match="is in use by another process"):
                begin(folder, **how)
        other.kill()
        other.wait()
    with begin(folder):
        pass


def test_a_refused_run_holds_no_lock(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run.write(1, state(1))
    with pytest.raises(BadInput):
        begin(tmp_path / "run")
    begin(tmp_path / "run", resume=True).close()
