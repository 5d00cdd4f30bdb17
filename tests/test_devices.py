"""Device files: the catalogue that ships, files of the user's own, and what is refused in them."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import psutil
import pytest

from amoeba_deploy.errors import BadInput, LatencyUnknown
from amoeba_deploy.profiles.device import CONFIDENCES, Device, Figure, device_names, load_device

CATALOGUE = [
    "a10", "a100-80", "agx-orin-64", "apple-m2", "apple-m3-pro", "apple-m4", "apple-m4-max", "epyc-zen4-2", "h100-sxm",
    "h200", "local", "orin-nano", "orin-nano-super", "orin-nx", "orin-nx-8", "raspberry-pi-5", "rtx-4090",
    "rtx-a5000", "snapdragon-8-elite", "snapdragon-8-gen3",
]  # fmt: skip

BOARD = """\
format = "amoeba.device/1"
name = "my-board"
description = "My board"
architecture = "sm_87"
[memory]
total = { value = 8, unit = "GiB", source = "me", confidence = "measured" }
visible = { value = 6500, unit = "MB", source = "me", confidence = "measured" }
[bandwidth]
peak = { value = 0.068, unit = "TB/s", source = "me", confidence = "data sheet" }
[compute]
fp16 = { value = 900, unit = "GFLOP/s", source = "me", confidence = "derived" }
[efficiency]
bandwidth_full = { value = 0.85, unit = "ratio", source = "me", confidence = "assumed" }
bandwidth_quantised = { value = 0.70, unit = "ratio", source = "me", confidence = "assumed" }
compute = { value = 0.6, unit = "ratio", source = "me", confidence = "assumed" }
[[flows]]
flow = "onnx"
precision = "int4"
block_overhead = { value = 50, unit = "us", source = "me", confidence = "assumed" }
fixed_overhead = { value = 0, unit = "ms", source = "me", confidence = "assumed" }
"""


def figures(device: Device) -> Iterator[Figure]:
    for each in fields(device):
        value = getattr(device, each.name)
        if isinstance(value, Figure):
            yield value
    yield from device.compute.values()
    for flow in device.flows:
        yield from (flow.block_overhead, flow.fixed_overhead)


def written(folder: Path, text: str) -> str:
    path = folder / "my-board.toml"
    path.write_text(text)
    return str(path)


def refusal(folder: Path, text: str) -> str:
    """What is said of a file, which must name the file and be one sentence."""
    path = written(folder, text)
    with pytest.raises(BadInput) as caught:
        load_device(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message
    return message


def test_catalogue_holds_these_devices() -> None:
    assert list(device_names()) == CATALOGUE


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_device_loads_and_every_figure_has_a_source(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert device.architecture
    for figure in figures(device):
        assert figure.source
        assert figure.confidence in CONFIDENCES


@pytest.mark.parametrize("name", CATALOGUE)
def test_overheads_are_marked_assumed(name: str) -> None:
    for flow in load_device(name).flows:
        assert {flow.block_overhead.confidence, flow.fixed_overhead.confidence} == {"assumed"}


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_device_lists_the_flows_that_can_be_built_here(name: str) -> None:
    device = load_device(name)
    assert device.preference("onnx").precision in ("fp32", "int8", "int4")
    assert device.preference("torch").precision in ("fp32", "bf16")


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "local"])
def test_every_device_but_local_can_be_estimated(name: str) -> None:
    device = load_device(name)
    assert device.bandwidth is not None
    assert device.compute["fp16"].base > 1e11
    assert device.memory_visible.base < device.memory_total.base


def test_orin_nx_in_base_units() -> None:
    device = load_device("orin-nx")
    assert device.memory_total.base == 16e9
    assert device.memory_visible.base == 14.5e9
    assert device.bandwidth is not None
    assert device.bandwidth.base == pytest.approx(102.4e9)
    # 8 SM, 918 MHz, 4 tensor cores of 256 fused multiply-adds a clock each.
    assert device.compute["fp16"].base == pytest.approx(8 * 918e6 * 4 * 256 * 2, rel=0.01)
    assert [(flow.flow, flow.precision) for flow in device.flows] == [
        ("tensorrt-llm", "int4"),
        ("onnx", "int4"),
        ("torch", "bf16"),
        ("mlc-llm", "q4f16_1"),
        ("gguf", "q4_k_m"),
        ("torch-compile", "bf16"),
    ]


def test_local_is_read_from_this_machine() -> None:
    device = load_device("local")
    assert device.architecture == platform.machine()
    assert device.memory_visible.base == psutil.virtual_memory().total
    assert device.bandwidth is None
    assert not device.compute
    assert [(flow.flow, flow.precision) for flow in device.flows] == [("onnx", "fp32"), ("torch", "fp32")]


def test_a_device_of_your_own_is_the_path_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = load_device(written(tmp_path, BOARD))
    assert device.name == "my-board"
    assert device.memory_total.base == 8 * 2**30
    assert device.memory_visible.base == 6.5e9
    assert device.bandwidth is not None
    assert device.bandwidth.base == pytest.approx(68e9)
    assert device.compute["fp16"].base == pytest.approx(0.9e12)
    assert device.preference("onnx").block_overhead.base == pytest.approx(0.05)
    monkeypatch.chdir(tmp_path)
    assert load_device("my-board.toml") == device


def test_a_file_may_leave_out_what_is_not_known(tmp_path: Path) -> None:
    head, _, rest = BOARD.partition("[bandwidth]")
    device = load_device(written(tmp_path, head + "[[flows]]" + rest.partition("[[flows]]")[2]))
    assert device.bandwidth is device.efficiency_compute is None


def test_an_unlisted_flow_is_unknown_and_the_listed_ones_are_named() -> None:
    with pytest.raises(
        LatencyUnknown, match=r"'orin-nx' lists no flow 'openvino'.*tensorrt-llm, onnx, torch"
    ) as caught:
        load_device("orin-nx").preference("openvino")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("orin-nx16", "'orin-nx'"), ("rtx4090", "'rtx-4090'"), ("h100", "'h100-sxm'"), ("A10", "'a10' or 'a100-80'")],
)
def test_a_mistyped_name_is_answered_with_the_closest(wrong: str, meant: str) -> None:
    with pytest.raises(BadInput, match=f"'{wrong}' is not a device; did you mean {meant}[?]"):
        load_device(wrong)


def test_an_unknown_name_is_answered_with_the_catalogue() -> None:
    with pytest.raises(BadInput, match=r"'zx81' is not a device; choose one of a10, .*\.toml"):
        load_device("zx81")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(BadInput, match=r"no-such\.toml: cannot be read \(No such file"):
        load_device("no-such.toml")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"a = " + b"[" * 100_000])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(BadInput, match=r"bad\.toml: is not valid TOML"):
        load_device(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize("form", ['"amoeba.device/2"', '"amoeba.plan/1"', "1"])
def test_another_format_is_refused(tmp_path: Path, form: str) -> None:
    assert "has format" in refusal(tmp_path, BOARD.replace('"amoeba.device/1"', form))


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ('architecture = "sm_87"\n', "architecture"),
        ('precision = "int4"\n', "flows[0]: lacks precision"),
        (
            'visible = { value = 6500, unit = "MB", source = "me", confidence = "measured" }\n',
            "[memory]: lacks visible",
        ),
        (', confidence = "data sheet"', "bandwidth.peak: lacks confidence"),
        (', source = "me", confidence = "derived"', "compute.fp16: lacks source, confidence"),
        ('compute = { value = 0.6, unit = "ratio", source = "me", confidence = "assumed" }\n', "[efficiency]: lacks"),
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, lost: str, named: str) -> None:
    assert lost in BOARD
    assert named in refusal(tmp_path, BOARD.replace(lost, ""))


@pytest.mark.parametrize(
    ("before", "added", "named"),
    [
        ("[memory]", "colour = 3\n", "unknown key 'colour'"),
        ("[bandwidth]", "swap = 3\n", "[memory]: has unknown key 'swap'"),
        ("[efficiency]", "fp4 = 3\n", "[compute]: has unknown key 'fp4'"),
        ("block_overhead = ", "threads = 3\n", "flows[0]: has unknown key 'threads'"),
    ],
)
def test_an_unknown_key_is_named(tmp_path: Path, before: str, added: str, named: str) -> None:
    assert named in refusal(tmp_path, BOARD.replace(before, added + before))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ('"TB/s"', '"GB"', "bandwidth.peak has unit 'GB', where a bandwidth belongs"),
        ('"GiB"', '"gb"', "memory.total has unit 'gb'"),
        ('"GFLOP/s"', '"TOPS"', "compute.fp16 has unit 'TOPS'"),
        ('"us"', '"ratio"', "block_overhead has unit 'ratio', where a time belongs"),
        ('"derived"', '"certain"', "compute.fp16 has confidence 'certain'"),
        (
            'source = "me", confidence = "derived"',
            'source = " ", confidence = "derived"',
            "compute.fp16: source is ' '",
        ),
        ('"my-board"', "7", "name is 7, where a text belongs"),
        ("value = 900", "value = 0", "compute.fp16 has value 0; it must be more than 0"),
        ("value = 900", "value = -1.5", "compute.fp16 has value -1.5"),
        ("value = 900", "value = true", "compute.fp16 has value True, where a number belongs"),
        ("value = 900", "value = nan", "where a number belongs"),
        ("value = 900", "value = inf", "where a number belongs"),
        ("value = 900", "value = 1" + "0" * 400, "where a number belongs"),
        ("value = 900", 'value = "900"', "where a number belongs"),
        ("value = 0,", "value = -1,", "fixed_overhead has value -1; it must be at least 0"),
        ("value = 0.85", "value = 85", "bandwidth_full has value 85; a share of the peak is at most 1"),
        ("value = 6500", "value = 9000", "memory.visible exceeds memory.total"),
    ],
)
def test_a_senseless_value_is_refused(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert right in BOARD
    assert said in refusal(tmp_path, BOARD.replace(right, wrong, 1))


def test_a_figure_is_a_table(tmp_path: Path) -> None:
    text = re.sub(r"peak = .*", "peak = 68", BOARD)
    assert "bandwidth.peak must be a table with value, unit, source and confidence" in refusal(tmp_path, text)


def test_flows_are_needed_and_each_comes_once(tmp_path: Path) -> None:
    head, _, flow = BOARD.partition("[[flows]]")
    assert "lacks flows" in refusal(tmp_path, head)
    assert "flows must be one or more" in refusal(tmp_path, "flows = []\n" + head)
    assert "lists the flow 'onnx' twice" in refusal(tmp_path, f"{head}[[flows]]{flow}[[flows]]{flow}")


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, amoeba_deploy.profiles.roofline; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "pydantic", "psutil", "onnx"} & set(loaded)
