"""Damaged, hostile and unlucky input of extraction: one sentence and its exit code, and nothing half-written.

The fuzz test mutates the files of a checkpoint. Whatever is accepted must be right: its weights are compared with those
that the safetensors library reads and numpy slices.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import amoeba, random_adapters, random_selection, save_random_model
from safetensors import SafetensorError
from safetensors.numpy import load_file

from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint, open_checkpoint
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.files import read_json_object, write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.quality import WIDTHS
from amoeba_deploy.selection import write_selection
from amoeba_deploy.subnet import Wishes, derive_folder
from amoeba_deploy.tensors import read_header

SHAPE = "3x0.67"
WEIGHTS = "base/model.safetensors"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A small tuned checkpoint with its base inside, in two shards."""
    return tuned_checkpoint(tmp_path)


def tuned_checkpoint(root: Path, shard: str = "5GB") -> Path:
    model = save_random_model(root / "model", "llama", num_hidden_layers=4, vocab_size=64, intermediate_size=128)
    if shard != "5GB":
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(model.path).save_pretrained(root / "sharded", max_shard_size=shard)
        model = ModelFolder(root / "sharded")
    selection, made = root / "selection", root / "checkpoint"
    selection.mkdir()
    made.mkdir()
    write_selection(selection, random_selection(model))
    create_checkpoint(str(model.path), selection, made, include_base=True)
    random_adapters(model, made, WIDTHS)
    write_json(made / "amoeba.json", read_json_object(made / "amoeba.json") | {"adapters": "smol"})
    return made


def seal(checkpoint: Path) -> None:
    """Make the digests those of the base as it now is, as if it had been so when the checkpoint was made."""
    digest = ModelFolder(checkpoint / "base").digest
    head = read_json_object(checkpoint / "amoeba.json")
    head["base"]["digest"] = digest
    write_json(checkpoint / "amoeba.json", head)
    write_json(checkpoint / "selection.json", read_json_object(checkpoint / "selection.json") | {"base_digest": digest})


def refused(checkpoint: Path, output: Path, match: str) -> None:
    """Extraction ends with one sentence and exit code 2 and leaves nothing."""
    done = amoeba("extract", checkpoint, "--shape", SHAPE, "-o", output)
    assert done.exit_code == 2, done.stderr + done.stdout
    assert match in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not output.exists()
    assert not [left for left in output.parent.iterdir() if left.name.startswith(f".{output.name}.")]


def change_header(file: Path, change: Callable[[dict[str, Any]], Any], data: bytes | None = None) -> None:
    """Rewrite a safetensors header, and its data if given."""
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + (whole[8 + length :] if data is None else data))


GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (lambda f: f.write_bytes(f.read_bytes()[:-1000]), "truncated"),
    "a byte too many": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "the file has"),
    "no header": (lambda f: f.write_bytes(b"\x01"), "damaged"),
    "an empty file": (lambda f: f.write_bytes(b""), "damaged"),
    "an absurd header size": (lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]), "should take"),
    "a header as large as the file": (
        lambda f: f.write_bytes((f.stat().st_size - 8).to_bytes(8, "little") + f.read_bytes()[8:]),
        "not the JSON object",
    ),
    "more than the file holds": (
        lambda f: change_header(f, lambda h: h[GATE].update(data_offsets=[0, 10**12], shape=[10**6, 250000])),
        "truncated",
    ),
    "tensors over each other": (
        lambda f: change_header(
            f, lambda h: h[GATE].update(data_offsets=h[GATE.replace("gate", "up")]["data_offsets"])
        ),
        "begins at byte",
    ),
    "another dtype": (lambda f: change_header(f, lambda h: h[GATE].update(dtype="F16")), "contradict"),
    "an integer dtype": (lambda f: change_header(f, lambda h: h[GATE].update(dtype="I32")), "I32"),
    "an unknown dtype": (
        lambda f: change_header(f, lambda h: h[GATE].update(dtype="F4")),
        "dtype F4, which is not read",
    ),
    "a missing tensor": (lambda f: change_header(f, lambda h: h.update(other=h.pop(GATE))), GATE),
    "another shape": (lambda f: change_header(f, lambda h: h[GATE].update(shape=h[GATE]["shape"][::-1])), "calls for"),
    "a negative size": (lambda f: change_header(f, lambda h: h[GATE].update(shape=[-128, -96])), "contradict"),
    "a link elsewhere": (lambda f: (f.rename(f.parent.parent.parent / "w"), f.symlink_to("../../w")), "is a link to"),
    "no file": (lambda f: f.unlink(), "holds neither"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused(damage: str, tuned: Path, tmp_path: Path) -> None:
    spoil, match = DAMAGE[damage]
    spoil(tuned / WEIGHTS)
    refused(tuned, tmp_path / "out", match)


@pytest.mark.parametrize("damage", ["truncated shard", "a missing tensor", "an unknown dtype", "no file"])
def test_damaged_adapters_are_refused(damage: str, tuned: Path, tmp_path: Path) -> None:
    file = tuned / "smol.safetensors"
    if damage == "a missing tensor":
        change_header(file, lambda h: h.update(other=h.pop("blocks.1.up_proj.lora_a")))
    elif damage == "an unknown dtype":
        change_header(file, lambda h: h["blocks.1.up_proj.lora_a"].update(dtype="F4"))
    else:
        DAMAGE[damage][0](file)
    refused(tuned, tmp_path / "out", "smol.safetensors")


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    made = tuned_checkpoint(tmp_path, "200KB")
    index = made / "base/model.safetensors.index.json"
    shards = sorted((made / "base").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert amoeba("extract", made, "--shape", SHAPE, "-o", tmp_path / "whole").exit_code == 0
    content = json.loads(index.read_text())
    for name, match in (("model-9.safetensors", "which is not there"), ("../x.safetensors", "outside its own folder")):
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {GATE: name}}))
        refused(made, tmp_path / "out", match)
    index.write_text("[" * 100_000)
    refused(made, tmp_path / "out", "not a safetensors index")
    index.write_text(json.dumps(content))
    shards[0].unlink()
    refused(made, tmp_path / "out", shards[0].name)


def test_a_hub_cache_of_links_is_read(tuned: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots/abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((tuned / "base").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert ModelFolder(snapshot).digest == ModelFolder(tuned / "base").digest


def test_a_disk_that_is_full_leaves_nothing(tuned: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk does, writing fails part way

    command = [sys.executable, "-m", "amoeba_deploy", "extract", str(tuned), "--shape", SHAPE, "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2
    assert "out: was not written" in done.stderr
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*out*"))


def test_a_kill_leaves_no_result_and_the_next_run_cleans_up(tuned: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, amoeba_deploy.tensors as t\n"
        "write = t._write_source\n"
        "def killed(d, name, *rest):\n"
        "    if 'layers.2' in name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(d, name, *rest)\n"
        "t._write_source = killed\n"
        "from amoeba_deploy.cli import main\n"
        f"main(['extract', {str(tuned)!r}, '--shape', {SHAPE!r}, '-o', 'out'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.*.part"))) == 1
    assert amoeba("extract", tuned, "--shape", SHAPE, "-o", tmp_path / "out").exit_code == 0
    assert not list(tmp_path.glob(".out.*"))
    assert ModelFolder(tmp_path / "out").check_shapes() is None


def test_a_shard_cut_short_while_it_is_read_is_an_error_and_not_a_crash(tuned: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tuned)
    size = (tuned / WEIGHTS).stat().st_size
    os.truncate(tuned / WEIGHTS, size // 2)
    with pytest.raises(BadInput, match="while it was read"):
        derive_folder(checkpoint, Wishes(SHAPE, bias=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def reference_weights(checkpoint: Checkpoint, plan: Any, base: Path, adapters: Path) -> dict[str, Any]:
    """The weights of a plan, from what the safetensors library reads, by plain slicing."""
    full, smol, sizes = load_file(base), load_file(adapters), checkpoint.architecture
    opened = checkpoint.adapters
    assert opened is not None
    shares = opened.mixture(plan.kept_blocks, plan.shape.width)
    found = {name: value for name, value in full.items() if "layers" not in name}
    for position, block in enumerate(plan.blocks):
        heads = [head * sizes.head_dim + row for head in block.heads for row in range(sizes.head_dim)]
        groups = [group * sizes.head_dim + row for group in block.kv_heads for row in range(sizes.head_dim)]
        kept = {"q": heads, "k": groups, "v": groups, "gate": list(block.neurons), "up": list(block.neurons)}
        for name in checkpoint.model.family.block_tensors(sizes):
            value = full[f"model.layers.{block.index}.{name}"]
            if "proj" in name:
                stem = f"blocks.{block.index}.{name.split('.')[1]}"
                a = np.einsum("e,eri->ri", shares, smol[f"{stem}.lora_a"])
                b = np.einsum("e,eor->or", shares, smol[f"{stem}.lora_b"])
                value = value + (opened.alpha / opened.rank * b) @ a
                part = name.split(".")[1].removesuffix("_proj")
                value = value[kept[part]] if part in kept else value[:, heads if part == "o" else list(block.neurons)]
            found[f"model.layers.{position}.{name}"] = value
    return found


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy of parsed JSON with one place changed to something else, dropped, doubled or nested."""
    strange = [None, True, -1, 0, 1, 3, 2**31, 10**18, 1.5, float("nan"), 1e308, "", "../..", "x" * 300, [], {}, [[]]]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return value | {key + "x": value[key]}
        return value | {key: mutate_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [*value[:place], mutate_json(value[place], rng), *value[place + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-32, -2, -1, 1, 2, 32])
    return rng.choice(strange)


def mutate_bytes(data: bytes, limit: int, rng: random.Random) -> bytes:
    """A few bytes flipped, dropped or put in among the first ``limit``, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, kind = rng.randrange(min(limit, len(changed))), rng.random()
        if kind < 0.6:
            changed[place] = rng.randrange(256)
        elif kind < 0.75:
            del changed[place]
        elif kind < 0.9:
            changed.insert(place, rng.randrange(256))
        else:
            del changed[rng.randrange(len(changed)) :]
    return bytes(changed) or b"\0"


FUZZED = (WEIGHTS, "base/config.json", "amoeba.json", "selection.json", "selection.safetensors", "smol.safetensors")


def fuzz(folder: Path, output: Path, rounds: int, seed: int) -> tuple[int, int]:
    """Mutate and extract so often; returns how many were refused and how many accepted."""
    pristine = {name: (folder / name).read_bytes() for name in FUZZED}
    rng, refusals, accepted = random.Random(seed), 0, 0
    for number in range(rounds):
        name = rng.choice(FUZZED)
        data = pristine[name]
        if name.endswith(".json"):
            as_text = rng.random() < 0.3
            new = (
                mutate_bytes(data, len(data), rng)
                if as_text
                else json.dumps(mutate_json(json.loads(data), rng)).encode()
            )
        else:
            length = int.from_bytes(data[:8], "little")
            if rng.random() < 0.5:
                header = mutate_json(json.loads(data[8 : 8 + length]), rng)
                text = json.dumps(header).encode()
                new = len(text).to_bytes(8, "little") + text + data[8 + length :]
            else:
                new = mutate_bytes(data, 8 + length, rng)
        (folder / name).write_bytes(new)
        try:
            if name.startswith("base/") and rng.random() < 0.8:
                seal(folder)
            checkpoint = open_checkpoint(folder)
            done = derive_folder(checkpoint, Wishes(SHAPE), output, force=True)
        except AmoebaError as error:
            refusals += 1
            said = str(error)
            assert said and "\n" not in said and len(said) < 2000, (number, name, said)
        else:
            accepted += 1
            try:
                wanted = reference_weights(checkpoint, done.plan, folder / WEIGHTS, folder / "smol.safetensors")
            except SafetensorError:
                # A metadata entry that is no text, say: then the tensors must be those of the untouched file.
                for other in (WEIGHTS, "smol.safetensors"):
                    (folder / other).write_bytes(pristine[other])
                wanted = reference_weights(checkpoint, done.plan, folder / WEIGHTS, folder / "smol.safetensors")
            found = load_file(output / "model.safetensors")
            assert set(found) == set(wanted) - ({"lm_head.weight"} if checkpoint.architecture.tied else set())
            for tensor, values in found.items():
                assert np.allclose(values, wanted[tensor], rtol=1e-5, atol=1e-5, equal_nan=True), (number, name, tensor)
        for each, content in pristine.items():
            (folder / each).write_bytes(content)
    return refusals, accepted


def test_mutated_checkpoints_are_refused_or_right(tuned: Path, tmp_path: Path) -> None:
    refusals, accepted = fuzz(tuned, tmp_path / "out", 150, seed=0)
    assert refusals > 50  # the mutations do damage
    assert accepted > 5  # and not all of them


@pytest.mark.slow
def test_many_mutated_checkpoints_are_refused_or_right(tuned: Path, tmp_path: Path) -> None:
    refusals, accepted = fuzz(tuned, tmp_path / "out", 2000, seed=1)
    assert refusals + accepted == 2000
    assert min(refusals, accepted) > 100


def test_headers_read_as_the_safetensors_library_reads_them(tuned: Path) -> None:
    infos, _ = read_header(tuned / WEIGHTS)
    wanted = load_file(tuned / WEIGHTS)
    assert {name: info.shape for name, info in infos.items()} == {name: v.shape for name, v in wanted.items()}


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "README.md"])
def test_a_link_that_would_be_copied_is_refused(name: str, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tuned / "base" / name).unlink(missing_ok=True)
    (tuned / "base" / name).symlink_to(tmp_path / "secret")
    refused(tuned, tmp_path / "out", "is a link to")


@pytest.mark.parametrize(
    ("file", "entry", "value"),
    [
        ("amoeba.json", "multiple", "Infinity"),
        ("amoeba.json", "widths", '["1", "1e-40000000"]'),
        ("selection.json", "blocks", "Infinity"),
    ],
)
def test_numbers_without_end_are_refused(file: str, entry: str, value: str, tuned: Path, tmp_path: Path) -> None:
    content = json.loads((tuned / file).read_text()) | {entry: "HERE"}
    (tuned / file).write_text(json.dumps(content).replace('"HERE"', value))
    refused(tuned, tmp_path / "out", file)


def test_a_pipe_is_no_file_of_weights(tuned: Path, tmp_path: Path) -> None:
    (tuned / WEIGHTS).unlink()
    os.mkfifo(tuned / WEIGHTS)
    refused(tuned, tmp_path / "out", "is no file")
