"""amoeba build: what is built again and why, the cache, failures, several processes, and the same bytes anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from projects import SMALL, TWO, Project, contents, project
from signers import make_authority, make_certificate, make_key

from amoeba_deploy.bundle import verify_files
from amoeba_deploy.bundle_check import check_bundle
from amoeba_deploy.checkpoint import EMBEDDED
from amoeba_deploy.cli import main
from amoeba_deploy.delivery.signing import Trust, read_release, verify_signature
from amoeba_deploy.progress import Progress
from amoeba_deploy.project.cache import BuildCache

__all__ = ["project"]


def sentence(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("amoeba: ")]
    return line


# What is built again


def test_a_first_build_makes_every_target_and_a_second_does_nothing(project: Project) -> None:
    first = project.build()
    assert {each["state"] for each in first["targets"]} == {"built"}
    for each in first["targets"]:
        assert check_bundle(Path(each["bundle"]), (), Progress(quiet=True)).selftest_tokens
    before = contents(project.folder)
    again = project.run("--quiet")
    assert "nothing to do: no target changed" in again.stdout
    assert project.states() == {"first": "unchanged", "second": "unchanged"}
    assert contents(project.folder) == before


def test_the_same_inputs_give_the_same_bytes_in_another_folder_and_cache(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.build()
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "other-cache"))
    shutil.copytree(EMBEDDED, tmp_path / "elsewhere" / "checkpoint")
    other = Project(tmp_path / "elsewhere").write('checkpoint = "checkpoint"\n' + TWO)
    assert set(other.states("--jobs", 2).values()) == {"built"}
    for name in ("first", "second"):
        one, two = (contents(each.folder / "dist" / name) for each in (project, other))
        assert one.keys() == two.keys()
        assert {file for file in one if one[file] != two[file]} <= {"measured.json"}


@pytest.mark.parametrize(
    "flow",
    ["gguf", "openvino", "torch", pytest.param("executorch", marks=pytest.mark.slow)],  # its exporter is slow
)
def test_every_engine_gives_the_same_bytes_again(project: Project, flow: str) -> None:
    device = "epyc-zen4-2" if flow == "openvino" else "raspberry-pi-5"
    project.write(f'[targets.one]\ndevice = "{device}"\nshape = "6x0.5"\nflow = ["{flow}"]\n')
    project.build()
    first = contents(project.folder / "dist" / "one")
    assert project.states("--force") == {"one": "built"}
    again = contents(project.folder / "dist" / "one")
    assert {file for file in first | again if first.get(file) != again.get(file)} <= {"measured.json"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("6x0.5", "6x0.75", 'option shape changed from "6x0.5" to "6x0.75"'),
        ('["int8"]', '["int8", "int4"]', "option precision changed"),
        ("verify = false", "verify = true", "option verify is gone"),
        ("verify = false", "verify = false\nworkload = { context = 256 }", "option workload.context is new (256)"),
        ('device = "raspberry-pi-5"', 'device = "apple-m2"', "option device changed"),
    ],
)
def test_a_target_whose_options_change_is_built_again_and_says_so(
    project: Project, old: str, new: str, said: str
) -> None:
    project.build()
    project.write(project.config.read_text().replace(old, new, 1))
    found = {each["target"]: each for each in project.build()["targets"]}
    assert found["first"]["state"] == "built" and said in found["first"]["reason"]
    assert found["second"]["state"] == "unchanged"


def test_what_only_says_where_a_bundle_goes_builds_nothing(project: Project) -> None:
    project.build()
    project.write(
        project.config.read_text().replace(SMALL, SMALL + 'output = "elsewhere"\nregistry = "x.example/y"\n', 1)
    )
    assert project.states() == {"first": "restored", "second": "unchanged"}
    assert (project.folder / "elsewhere" / "manifest.json").is_file()


def test_another_checkpoint_is_built_again(project: Project) -> None:
    shutil.copytree(EMBEDDED, project.folder / "checkpoint")
    project.write('checkpoint = "checkpoint"\n' + TWO)
    project.build()
    file = project.folder / "checkpoint" / "quality.json"
    file.write_text(file.read_text().replace('"accuracy": 0.', '"accuracy": 0.0', 1))
    found = project.build("--explain")["targets"]
    assert [each["state"] for each in found] == ["built", "built"]
    assert all("checkpoint changed from sha256:" in each["reason"] for each in found)


def test_another_version_of_an_engine_is_built_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    project.build()
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == "onnxruntime" else real(name))
    found = project.build("--dry-run")["targets"]
    assert all(each["state"] == "would build" for each in found)
    assert all(f"package onnxruntime changed from {real('onnxruntime')} to 99.0" in each["reason"] for each in found)


def test_another_tool_is_built_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import amoeba_deploy.project.inputs as inputs

    project.build()
    monkeypatch.setattr(inputs, "source_digest", lambda: "sha256:" + "0" * 64)
    assert all("amoeba-deploy changed" in each["reason"] for each in project.build("--dry-run")["targets"])


def test_a_changed_plan_table_or_device_file_is_built_again(project: Project) -> None:
    plan, device = project.folder / "plan.json", project.folder / "board.toml"
    said = CliRunner().invoke(main, ["extract", "--shape", "6x0.5", "--plan-only"])
    plan.write_text(said.stdout)
    catalogue = Path(__file__).parent.parent / "amoeba_deploy" / "profiles" / "devices"
    device.write_text((catalogue / "raspberry-pi-5.toml").read_text().replace('"raspberry-pi-5"', '"board"', 1))
    text = SMALL.replace('"6x0.5"', '"plan.json"').replace('"raspberry-pi-5"', '"board.toml"')
    project.write("[targets.one]\n" + text)
    assert project.build()["targets"][0]["figures"]["device"] == "board"
    assert project.states() == {"one": "unchanged"}
    device.write_text(device.read_text() + "\n")
    assert "device file changed" in project.build("--dry-run")["targets"][0]["reason"]
    project.build()
    plan.write_text(plan.read_text() + "\n")
    assert "plan changed" in project.build("--dry-run")["targets"][0]["reason"]


def test_a_dry_run_builds_and_writes_nothing(project: Project) -> None:
    assert set(project.states("--dry-run").values()) == {"would build"}
    assert not (project.folder / "dist").exists()
    project.build()
    shutil.rmtree(project.folder / "dist" / "first")
    assert project.states("--dry-run") == {"first": "would restore", "second": "unchanged"}
    assert not (project.folder / "dist" / "first").exists()


def test_a_lost_or_changed_output_is_restored_from_the_cache(project: Project) -> None:
    project.build()
    shutil.rmtree(project.folder / "dist" / "first")
    (project.folder / "dist" / "second" / "config.json").unlink()
    assert project.states() == {"first": "restored", "second": "restored"}
    for name in ("first", "second"):
        verify_files(project.folder / "dist" / name)


def test_a_damaged_cache_is_noticed_before_anything_is_handed_out(project: Project) -> None:
    project.build("--target", "first")
    (entry,) = BuildCache().entries()
    file = next(entry.bundle.glob("engine/*.onnx*"))
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()[:100]) + file.read_bytes()[100:])
    shutil.rmtree(project.folder / "dist")
    (found,) = project.build("--target", "first")["targets"]
    assert (found["state"], found["reason"]) == ("built", "its bundle in the cache is damaged")
    verify_files(project.folder / "dist" / "first")
    (entry.bundle / "manifest.json").write_text("{}")
    shutil.rmtree(project.folder / "dist")
    assert project.states("--target", "first") == {"first": "built"}


def test_another_folders_project_takes_from_the_same_cache(project: Project, tmp_path: Path) -> None:
    project.build()
    other = Project(tmp_path / "other").write(TWO)
    assert project.build()["cache"] == other.build("--dry-run")["cache"]
    assert set(other.states().values()) == {"restored"}


# Targets


def test_flows_are_tried_in_their_order(project: Project) -> None:
    project.write(
        '[targets.one]\ndevice = "raspberry-pi-5"\nshape = "6x0.5"\nverify = false\n'
        'flow = ["tensorrt-llm", "onnx", "gguf"]\nprecision = ["q8_0", "int8"]\n'
    )
    (found,) = project.build()["targets"]
    assert (found["figures"]["flow"], found["figures"]["precision"]) == ("onnx", "int8")
    assert "tensorrt-llm" in "".join(found["remarks"])


def test_a_preference_that_does_not_fit_is_passed_over(project: Project) -> None:
    project.write(
        '[targets.one]\ndevice = "raspberry-pi-5"\nsize = "4MB"\nflow = ["onnx"]\n'
        'precision = ["fp32", "int4"]\nverify = false\n'
    )
    (found,) = project.build()["targets"]
    assert found["figures"]["precision"] == "int4"
    assert "passed over onnx fp32: no shape fits the budget" in found["remarks"][0]


def test_a_target_that_fails_does_not_stop_the_others(project: Project) -> None:
    project.write(TWO + '\n[targets.never]\ndevice = "raspberry-pi-5"\nlatency = "1us"\nflow = ["onnx"]\n')
    result = project.run()
    assert result.exit_code == 3
    assert "1 of 3 targets failed (never); never: no shape fits the budget" in sentence(result.stderr)
    assert project.states(code=3) == {"first": "unchanged", "second": "unchanged", "never": "failed"}
    assert not (project.folder / "dist" / "never").exists()


def test_targets_are_built_after_what_they_need(project: Project) -> None:
    project.write(TWO.replace("[targets.first]\n", '[targets.first]\nneeds = ["second"]\n'))
    assert list(project.states()) == ["second", "first"]
    assert list(project.states("--target", "first")) == ["second", "first"]


def test_a_target_that_needs_a_failed_one_is_skipped(project: Project) -> None:
    never = '[targets.never]\ndevice = "raspberry-pi-5"\nlatency = "1us"\nflow = ["onnx"]\n'
    project.write(TWO.replace("[targets.first]\n", '[targets.first]\nneeds = ["never"]\n') + never)
    for jobs in (1, 3):
        assert project.states("--jobs", jobs, code=3)["first"] == "skipped"
    assert not (project.folder / "dist" / "first").exists()


def test_several_processes_build_what_one_does(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = TWO + f'[targets.third]\nneeds = ["first"]\n{SMALL.replace("6x0.5", "8x0.5")}'
    assert set(project.write(third).states("--jobs", 2).values()) == {"built"}
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache-of-one"))
    alone = Project(tmp_path / "alone").write(third)
    alone.build()
    for name in ("first", "second", "third"):
        one, two = (contents(each.folder / "dist" / name) for each in (project, alone))
        assert {file for file in one | two if one.get(file) != two.get(file)} <= {"measured.json"}


def test_engines_of_one_shape_share_their_extraction(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import amoeba_deploy.lowering as lowering

    extracted = []
    real = lowering.extract

    def counted(*arguments: object, **named: object) -> object:
        extracted.append(named.get("dtype"))
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(lowering, "extract", counted)
    one = 'device = "raspberry-pi-5"\nshape = "6x0.5"\nverify = false\n'
    project.write(
        f'[targets.a]\n{one}flow = ["onnx"]\nprecision = ["int8"]\n'
        f'[targets.b]\n{one}flow = ["onnx"]\nprecision = ["int4"]\n'
        f'[targets.c]\n{one}flow = ["gguf"]\nprecision = ["q8_0"]\n'
    )
    project.build()
    assert len(extracted) == 1
    assert list((BuildCache().folder / "work").iterdir()) == []


def test_a_local_target_is_measured_and_does_nothing_the_second_time(project: Project) -> None:
    workload = "workload = { prompt = 8, tokens = 4, context = 64 }"
    project.write(
        f'[targets.here]\ndevice = "local"\nshape = "6x0.5"\nflow = ["onnx"]\nprecision = ["int8"]\n{workload}\n'
    )
    (found,) = project.build()["targets"]
    assert found["figures"]["measured"]["tpot_ms"] > 0
    assert found["figures"]["predicted"]["machines"] == found["figures"]["measured"]["machines"]
    assert project.states() == {"here": "unchanged"}


# Bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('chekpoint = "x"', "'chekpoint' is not a key of it; did you mean 'checkpoint'?"),
        ('[targets.a]\ndevise = "orin-nx"', "'targets.a.devise' is not a key of it; did you mean 'device'?"),
        ("[targets.a]\nmax_loss = 1.0", "did you mean 'max-loss'?"),
        ('[targets.a]\ncolour = "red"', "'targets.a.colour' is not a key of it; known are device, latency"),
        ("[targets.a]\nworkload = { bach = 1 }", "'targets.a.workload.bach' is not a key of it; did you mean 'batch'?"),
        ('[targets.a]\ndevice = "orin-nx"', "[targets.a] has no budget"),
        ('[targets.a]\nlatency = "40ms"', "[targets.a] names no device"),
        ('[targets.a]\nlatency = "40"', "'targets.a.latency' = '40' is not a latency with its unit, such as 40ms"),
        ('[targets.a]\nmemory = "8Gb"', "is not an amount with its unit, such as 8GB"),
        ('[targets.a]\ndevice = "orin-nx"\nlatency = "0ms"', "must be more than zero"),
        ('[targets.a]\nflow = "onnx"', "'targets.a.flow': must be a list in brackets"),
        ("[build]\njobs = 0", "'build.jobs': Input should be greater than or equal to 1"),
        ('[defaults]\noutput = "x"', "'output' is of one target"),
        ('[targets."a/b"]\ndevice = "orin-nx"', "is not a name of letters, digits"),
        ("[targets", "is not valid TOML"),
        ("", "has no targets; add such as [targets.kiosk]"),
        ('[targets.a.5]\ndevice = "orin-nx"', 'a name with a dot needs quotes: [targets."a.5"]'),
        (TWO.replace("[targets.first]\n", '[targets.first]\nneeds = ["secnd"]\n'), "did you mean 'second'?"),
        (
            TWO.replace(SMALL, SMALL + 'output = "dist/second/x"\n', 1),
            "the outputs of first and second lie in each other",
        ),
        (
            f'[targets.a]\nneeds = ["b"]\n{SMALL}[targets.b]\nneeds = ["a"]\n{SMALL}',
            "targets need each other in a circle: ",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(project: Project, text: str, said: str) -> None:
    result = project.write(text + "\n").run()
    assert result.exit_code in (2, 3), result.output
    assert said in result.stderr
    assert not (project.folder / "dist").exists()


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["build", "--config", str(tmp_path / "none.toml")])
    assert result.exit_code == 2 and "write one with 'amoeba init'" in sentence(result.stderr)


def test_an_unknown_target_flow_device_or_checkpoint_is_one_sentence(project: Project) -> None:
    assert "'third' is not a target" in sentence(project.run("--target", "third").stderr)
    project.write(TWO.replace('["onnx"]', '["onyx"]', 1))
    assert "did you mean 'onnx'" in sentence(project.run().stderr)
    project.write(TWO.replace("raspberry-pi-5", "raspberry-pi-6", 1))
    assert "'raspberry-pi-6' is not a device" in sentence(project.run().stderr)
    project.write('checkpoint = "nowhere"\n' + TWO)
    assert "is no one-for-all checkpoint" in sentence(project.run().stderr)


def test_an_output_of_somebody_else_is_not_replaced(project: Project) -> None:
    own = project.folder / "dist" / "first" / "own.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert project.states(code=2) == {"first": "failed", "second": "built"}
    assert own.read_text() == "mine"


# Interrupted, and at once


def command(project: Project, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "amoeba_deploy", "build", "--config", str(project.config), *arguments]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_build_leaves_nothing_half_written_and_the_next_completes(project: Project, jobs: str) -> None:
    process = subprocess.Popen(command(project, "--jobs", jobs), start_new_session=True, stderr=subprocess.PIPE)
    assert process.stderr is not None
    while b"building" not in process.stderr.readline():
        pass
    time.sleep(0.7)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for folder in (project.folder / "dist").glob("[!.]*"):
        verify_files(folder)
    assert project.build()["targets"]
    for name in ("first", "second"):
        verify_files(project.folder / "dist" / name)


def test_the_processes_of_a_killed_build_end_with_it(project: Project) -> None:
    process = subprocess.Popen(command(project, "--jobs", "2"), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "building onnx" not in process.stderr.readline():
        pass
    process.kill()
    process.stderr.read()  # ends when no process that writes there is left
    process.wait()
    time.sleep(0.5)
    assert not [name for name in ("first", "second") if (project.folder / "dist" / name).exists()]


def test_a_build_that_is_asked_to_end_ends_with_its_processes(project: Project) -> None:
    process = subprocess.Popen(command(project, "--jobs", "2"), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "building" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()  # ends when no process of it is left
    assert process.wait() == 1
    assert "amoeba: interrupted" in said


def test_two_builds_at_once_build_each_target_once(project: Project, tmp_path: Path) -> None:
    other = Project(tmp_path / "other").write(TWO)
    both = [subprocess.Popen(command(each, "--json", "--quiet"), stdout=subprocess.PIPE) for each in (project, other)]
    said = [json.loads(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    states = sorted(each["state"] for value in said for each in value["targets"])
    assert states == ["built", "built", "restored", "restored"]
    assert len(BuildCache().entries()) == 2
    for each in (project, other):
        for name in ("first", "second"):
            verify_files(each.folder / "dist" / name)


# The cache


def test_the_cache_is_listed_and_pruned(project: Project) -> None:
    project.build()
    listed = json.loads(CliRunner().invoke(main, ["cache", "list", "--json"]).stdout)
    assert {entry["target"] for entry in listed["entries"]} == {"first", "second"}
    assert listed["bytes"] == sum(entry["bytes"] for entry in listed["entries"]) > 0
    first = next(entry for entry in BuildCache().entries() if entry.facts["target"] == "first")
    os.utime(first.folder / "entry.json", (time.time() - 10 * 86400,) * 2)
    removed = json.loads(CliRunner().invoke(main, ["cache", "prune", "--older-than", "9d", "--json"]).stdout)
    assert removed["removed"] == [first.key]
    assert json.loads(CliRunner().invoke(main, ["cache", "prune", "--keep", "1GB", "--json"]).stdout)["removed"] == []
    assert len(json.loads(CliRunner().invoke(main, ["cache", "prune", "--json"]).stdout)["removed"]) == 1
    assert BuildCache().entries() == []
    # What is there already need not be built for the cache's sake.
    assert project.states() == {"first": "unchanged", "second": "unchanged"}
    shutil.rmtree(project.folder / "dist" / "first")
    assert project.states() == {"first": "built", "second": "unchanged"}


def test_what_is_being_built_is_not_pruned(project: Project) -> None:
    project.build()
    entries = BuildCache().entries()
    with BuildCache().lock(entries[0].key):
        removed = BuildCache().prune()
    assert [entry.key for entry in removed] == [entries[1].key]


def test_a_cache_that_cannot_be_written_is_one_sentence(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = project.run(AMOEBA_CACHE=str(tmp_path / "file" / "cache"))
    assert result.exit_code == 2 and "set AMOEBA_CACHE" in sentence(result.stderr)


# Reports, signatures


def test_junit_and_the_summary_tell_of_every_target_and_gate(project: Project, tmp_path: Path) -> None:
    project.write(TWO + '\n[targets.never]\ndevice = "raspberry-pi-5"\nlatency = "1us"\nflow = ["onnx"]\n')
    summary, junit = tmp_path / "summary.md", tmp_path / "junit.xml"
    summary.write_text("before\n")
    gates = ("--fail-if", "size > 1kB".replace("1kB", "0.001MB"), "--fail-if", "size > 2 * baseline")
    assert project.run("--summary", summary, "--junit", junit, *gates).exit_code == 3
    root = ElementTree.parse(junit).getroot()
    (suite,) = root
    assert suite.attrib["tests"] == "7" and suite.attrib["failures"] == "3" and suite.attrib["skipped"] == "2"
    assert {case.attrib["name"] for case in suite if case.attrib["classname"] == "build"} == {
        "first",
        "second",
        "never",
    }
    text = summary.read_text()
    assert text.startswith("before\n### amoeba build: 2 of 3 targets")
    assert "| first | raspberry-pi-5 | onnx int8 | 6x0.5 |" in text
    assert "**never** failed: no shape fits" in text
    assert "| broken |" in text and "| not compared |" in text


def test_a_build_signs_with_a_key_from_a_file_or_the_environment(project: Project) -> None:
    pair = make_key(project.folder, "own")
    text = TWO.replace(SMALL, SMALL + 'private-key = "own.key"\n', 1)
    project.write(text.replace("[targets.second]\n", '[targets.second]\nprivate-key = "env:OWN_KEY"\n'))
    result = project.run("--sign", "--serial", 5)
    assert result.exit_code == 2 and "the environment variable OWN_KEY is not set" in sentence(result.stderr)
    assert not (project.folder / "dist").exists()
    assert project.build("--target", "first", "--sign", "--serial", 5)["targets"][0]["signed"] == 5
    found = project.build("--sign", OWN_KEY=pair.private.read_text())["targets"]
    assert found[0]["signed"] is None and found[1]["signed"] > 1_700_000_000
    assert project.build("--sign", "--serial", 6, "--target", "second", OWN_KEY=pair.private.read_text())
    trust = Trust.of([pair.public])
    for name, serial in (("first", 5), ("second", 6)):
        verify_signature(project.folder / "dist" / name, trust)
        release = read_release(project.folder / "dist" / name)
        assert release is not None and release.serial == serial
    assert project.states() == {"first": "unchanged", "second": "unchanged"}


def test_init_writes_a_project_that_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(main, ["init", "--name", "board"])
    assert said.exit_code == 0, said.output
    assert "exists already" in sentence(CliRunner().invoke(main, ["init"]).stderr)
    (found,) = Project(tmp_path).build("--dry-run")["targets"]
    assert (found["target"], found["state"]) == ("board", "would build")
    assert CliRunner().invoke(main, ["init", "--force", "--device", "orin-nxx"]).exit_code == 2
    assert "[targets.board]" in (tmp_path / "amoeba.toml").read_text()


def test_another_key_or_a_damaged_signature_is_signed_again(project: Project) -> None:
    old, new = make_key(project.folder, "old"), make_key(project.folder, "new")
    project.write(f'[targets.one]\nprivate-key = "old.key"\n{SMALL}')
    bundle = project.folder / "dist" / "one"
    project.build("--sign", "--serial", 1)
    assert project.build("--sign")["targets"][0]["signed"] is None
    (bundle / "model.sig").write_text("garbage")
    assert project.build("--sign", "--serial", 2)["targets"][0]["signed"] == 2
    verify_signature(bundle, Trust.of([old.public]))
    project.write(project.config.read_text().replace("old.key", "new.key"))
    assert project.build("--sign", "--serial", 3)["targets"][0]["signed"] == 3
    verify_signature(bundle, Trust.of([new.public]))


def test_a_target_is_signed_with_its_certificate(project: Project) -> None:
    authority = make_authority(project.folder)
    make_certificate(project.folder, authority, "own")
    project.write(f'[targets.one]\nprivate-key = "own.key"\ncertificate = "own.crt"\n{SMALL}')
    project.build("--sign")
    assert verify_signature(project.folder / "dist" / "one", Trust.of([authority.file])).signer == "CN=own"


def test_what_cannot_be_signed_or_pushed_is_said_before_anything_is_built(project: Project) -> None:
    assert "nothing would be signed, no target names a private-key" in sentence(project.run("--sign").stderr)
    assert "nothing would be pushed, no target names a registry" in sentence(project.run("--push").stderr)
    with_key = TWO.replace(SMALL, SMALL + 'private-key = "missing.key"\nregistry = "nope"\n', 1)
    project.write(with_key)
    assert "private-key of [targets.first]: " in project.run("--sign").stderr
    assert "registry of [targets.first]: 'nope' names no registry" in project.run("--push").stderr
    make_key(project.folder, "missing", password=b"open sesame")
    assert "AMOEBA_KEY_PASSWORD" in sentence(project.run("--sign").stderr)
    make_key(project.folder, "missing")
    assert not (project.folder / "dist").exists()
    said = project.run("--sign")
    assert said.exit_code == 0 and "note: second is not signed, it names no private-key" in said.stderr


def test_a_wrong_flow_stops_a_build_before_it_begins(project: Project) -> None:
    project.write(TWO + '[targets.third]\ndevice = "orin-nx"\nlatency = "1s"\nflow = ["onxx"]\n')
    for arguments in ((), ("--dry-run",)):
        result = project.run(*arguments)
        assert result.exit_code == 2 and "did you mean 'onnx'" in sentence(result.stderr)
    assert not (project.folder / "dist").exists()


def test_a_flow_without_the_precisions_is_named_in_the_remarks(project: Project) -> None:
    project.write(
        '[targets.one]\ndevice = "raspberry-pi-5"\nshape = "6x0.5"\nflow = ["onnx", "gguf"]\n'
        'precision = ["q8_0"]\nverify = false\n'
    )
    (found,) = project.build()["targets"]
    assert "passed over onnx: it has none of these precisions" in found["remarks"]


def test_a_build_leaves_nothing_temporary_and_takes_away_what_killed_ones_left(
    project: Project, tmp_path: Path
) -> None:
    left = BuildCache().work_folder() / "run-left"
    (left / "subnets").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        command(project, "--jobs", "2"),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    assert process.stderr is not None
    while "building onnx" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.stderr.read()
    process.wait()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert list(BuildCache().work_folder().iterdir()) == []


def test_an_interrupt_from_the_terminal_is_one_sentence(project: Project) -> None:
    process = subprocess.Popen(
        command(project, "--jobs", "2"), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "building onnx" not in process.stderr.readline():
        pass
    os.killpg(process.pid, signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 1
    assert "Traceback" not in said
    assert sentence(said).startswith("amoeba: interrupted")


def test_a_full_disk_is_one_sentence(project: Project) -> None:
    project.build()
    shutil.rmtree(project.folder / "dist")
    script = (
        "import os, shutil, errno, sys\n"
        "real = shutil.copyfile\n"
        "def full(source, target, **more):\n"
        "    if 'weights' in str(target):\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device', str(target))\n"
        "    return real(source, target, **more)\n"
        "shutil.copyfile = full\n"
        "from amoeba_deploy.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command(project, "--quiet")[3:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "No space left on device" in sentence(done.stderr) and "free some there" in sentence(done.stderr)
    assert list((project.folder / "dist").iterdir()) == []
