"""A pickle from elsewhere is read without being run: whatever it names, builds or claims beyond numbers is refused.

Each hostile file is imported through the command; the marker that it would make is not there. Of those that Python's
own reader runs, that is shown too.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import random
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import amoeba, sentence
from released import make_released

from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.released.checkpoint import _Strategy
from amoeba_deploy.released.pickled import PickledArray, read_pickled_dict

Models = Callable[[str], ModelFolder]
NPY = "dp_selection_strategy.npy"


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.how = function, arguments

    def __reduce__(self) -> Any:
        return self.how


def header(text: str = "{'descr': '|O', 'fortran_order': False, 'shape': (), }", length: int | None = None) -> bytes:
    data = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data) if length is None else length) + data


def saved(value: Any, **settings: Any) -> bytes:
    """What numpy.save writes."""
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=True, **settings)
    return stream.getvalue()


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def calling(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function by its name with a text."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"
DTYPE_STATE = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
FLOATS = DTYPE + DTYPE_STATE
OBJECTS = FLOATS.replace(b"f8", b"O8").replace(b"<", b"|").replace(b"K\x00tb", b"K\x3ftb")


TRILLION = b"\x8a\x06" + (10**12).to_bytes(6, "little")


def line(value: str) -> bytes:
    """A text in the older opcode."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def state(kind: bytes, shape: bytes = b"K\x01\x85", data: bytes = b"C\x08" + bytes(8)) -> bytes:
    """What fills a blank array."""
    return b"(K\x01" + shape + kind + b"\x89" + data + b"tb"


def whole(content: bytes) -> bytes:
    """A file of one object, the pickle of which is given."""
    return header() + b"\x80\x03" + RECONSTRUCT + state(OBJECTS, b")", b"]" + content + b"a") + b"."


def claiming(shape: bytes, data: bytes = b"C\x08" + bytes(8)) -> bytes:
    """A file of a dict with an array of floats of a claimed shape."""
    return whole(b"}" + line("a") + RECONSTRUCT + state(FLOATS, shape, data) + b"s")


def test_the_files_made_here_are_read_where_they_are_honest(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(claiming(b"K\x01\x85"))
    found = read_pickled_dict(tmp_path / "a.npy")["a"]
    assert found.values.tolist() == [0.0]
    assert np.load(tmp_path / "a.npy", allow_pickle=True).item()["a"].tolist() == [0.0]


def test_what_numpy_saves_is_read_as_numpy_reads_it(tmp_path: Path) -> None:
    arrays = [
        np.arange(3.0), np.arange(3, dtype=np.float32), np.ones(2, bool), np.zeros(0), np.arange(4, dtype=">i8"),
        np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(2.5), np.arange(3, dtype=np.uint8), np.float16([1, 2]),
    ]  # fmt: skip
    value = {"arrays": arrays, 1: OrderedDict(a=1.5), 0.5: [None, True, -7, 2**70, "ü", (1, 2, 3, 4), ()]}
    value |= {
        "numbers": [np.float64(1.5), np.int64(-3), np.bool_(True), np.float32(0.5)],
        "bytes": b"x",
        "again": arrays,
    }
    for boxed in (value, np.array([value], dtype=object)):
        np.save(tmp_path / "a.npy", boxed, allow_pickle=True)
        found = read_pickled_dict(tmp_path / "a.npy")
        for mine, theirs in zip(found["arrays"], arrays, strict=True):
            assert isinstance(mine, PickledArray)
            assert mine.values is not None
            assert (mine.values.dtype, mine.values.shape) == (theirs.dtype, theirs.shape)
            assert (mine.values == theirs).all()
        assert found[1] == {"a": 1.5}
        assert found[0.5] == value[0.5]
        assert found["numbers"] == [1.5, -3, 1, 0.5]


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_files_of_both_numpys_and_their_protocols_are_read(protocol: int, module: str, tmp_path: Path) -> None:
    boxed = np.empty((), object)
    boxed[()] = {"a": np.arange(3.0), "b": np.float64(2)}
    data = pickle.dumps(boxed, protocol)
    if module == "numpy.core" and protocol == 3:
        data = data.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "a.npy").write_bytes(header() + data)
    found = read_pickled_dict(tmp_path / "a.npy")
    assert (found["a"].values.tolist(), found["b"]) == ([0.0, 1.0, 2.0], 2.0)


def hostile(ran: Path) -> dict[str, tuple[bytes, str]]:
    """Files by what they try, each with a part of the sentence that refuses it; those named ``!`` really run."""
    touch, code = f"touch {ran}", f"open({str(ran)!r}, 'w').close()"
    nested = np.empty(1, object)
    nested[0] = Calls(os.system, touch)
    plain = np.empty(1, object)
    plain[0] = {"a": 1}
    metadata = np.dtype("f8", metadata={"a": Calls(os.system, touch)})
    arguments = b"](" + text("touch") + text(str(ran)) + b"e"
    fields = DTYPE_STATE.replace(b"NNN", b"N)}")
    blank_dtype = RECONSTRUCT.replace(b"ndarray", b"dtype")
    getattr_of_os = b"\x80\x02cbuiltins\ngetattr\n(cposixpath\nos\n" + line("system") + b"tR(" + line(touch) + b"tR."
    evil_header = f"{{'descr': __import__('os').system('{touch}'), 'fortran_order': False, 'shape': (), }}"
    long_header = "{'descr': '|O', 'fortran_order': False, 'shape': (1000000000000,), }"
    deep = b"}" + b")" + b"\x85" * 100_000 + b"K\x01s"
    bomb = b"})" + b"2\x86" * 60 + b"K\x01s"
    twin = b"})" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"K\x01s"
    return {
        "! os.system": (saved({"a": Calls(os.system, touch)}), "'posix.system'"),
        "! builtins.eval": (saved({"a": Calls(eval, code)}), "'builtins.eval'"),
        "! exec as a key": (saved({Calls(exec, code): 1}), "'builtins.exec'"),
        "! getattr of a module": (header() + getattr_of_os, "'builtins.getattr'"),
        "! in an array of objects": (saved({"a": nested}), "posix.system"),
        "! in a dtype": (saved({"a": np.zeros(2, metadata)}), "posix.system"),
        "! by names on the stack": (header() + calling("posix", "system", touch), "'posix.system'"),
        "! by a name in a line": (header() + b"\x80\x02cposix\nsystem\n" + line(touch) + b"\x85R.", "'posix.system'"),
        "! by INST": (header() + b"\x80\x02(" + line(touch) + b"iposix\nsystem\n.", "opcode INST"),
        "by OBJ": (header() + b"\x80\x02(cposix\nsystem\n" + text(touch) + b"o.", "posix.system"),
        "by NEWOBJ": (
            header() + calling("subprocess", "Popen", "touch")[:-10] + arguments + b"\x85\x81.",
            "'subprocess.Popen'",
        ),
        "! by a path through numpy": (
            header() + calling("numpy.testing._private.utils", "runstring", code)[:-3] + b"}\x86R.",
            "runstring",
        ),
        "a dotted name": (header() + calling("numpy", "ndarray.tofile", str(ran)), "'numpy.ndarray.tofile'"),
        "a dotted module": (header() + calling("numpy.core.multiarray.os", "system", touch), "os.system"),
        "numpy.load": (header() + calling("numpy", "load", str(ran)), "'numpy.load'"),
        "! by an extension code": (header() + b"\x80\x02\x82\xf0" + text(touch) + b"\x85R.", "opcode EXT1"),
        "a persistent id": (header() + b"\x80\x02" + text(touch) + b"Q.", "opcode BINPERSID"),
        "a persistent id in a line": (header() + b"\x80\x02P" + touch.encode() + b"\n.", "opcode PERSID"),
        "a buffer out of band": (header() + b"\x80\x05\x97.", "protocol"),
        "a call of the class of arrays": (header() + b"\x80\x03cnumpy\nndarray\nK\x01\x85\x85R.", "calls ndarray"),
        "a call of text": (header() + b"\x80\x03X\x02\x00\x00\x00os)R.", "calls what is no part"),
        "a call of a blank array": (header() + b"\x80\x03" + RECONSTRUCT + b")R.", "calls what is no part"),
        "an array of another class": (header() + b"\x80\x03" + blank_dtype + b".", "as numpy never does"),
        "a blank array of 10**12 numbers": (
            header() + b"\x80\x03" + RECONSTRUCT.replace(b"K\x00", TRILLION) + b".",
            "as numpy never does",
        ),
        "10**12 numbers": (claiming(TRILLION + b"\x85"), "1000000000000"),
        "a number of numbers beyond all": (claiming(b"\x8a\xff" + b"\x7f" * 255 + b"\x85"), "claims an array"),
        "a negative shape": (claiming(b"J\xff\xff\xff\xff\x85"), "cannot be"),
        "a shape of floats": (claiming(b"G" + struct.pack(">d", 1.0) + b"\x85"), "cannot be"),
        "a list of numbers for bytes": (claiming(b"K\x01\x85", b"]"), "as numpy never does"),
        "one array, two states": (whole(RECONSTRUCT + state(FLOATS) * 2), "two states"),
        "a dtype of objects inside": (saved({"a": plain}), "array of objects inside another"),
        "a dtype of text": (saved({"a": np.array(["abc"])}), "the dtype 'U3'"),
        "a dtype of fields": (saved({"a": np.zeros(1, [("x", "f8"), ("y", "i4")])}), "the dtype 'V12'"),
        "a dtype of dates": (saved({"a": np.zeros(1, "M8[s]")}), "the dtype 'M8'"),
        "a dtype with fields in its state": (whole(DTYPE + fields), "describes a dtype"),
        "a dtype with two states": (whole(FLOATS + DTYPE_STATE), "describes a dtype"),
        "an array without a dtype's state": (whole(RECONSTRUCT + state(DTYPE)), "as numpy never does"),
        "a state for a dict": (whole(b"}}b"), "a state"),
        "a state for a name": (whole(b"cnumpy\nndarray\n}b"), "a state"),
        "a state of attributes for an array": (whole(RECONSTRUCT + b"}X\x01\x00\x00\x00aK\x01sb"), "no tuple"),
        "a state for an OrderedDict": (whole(b"ccollections\nOrderedDict\n)R)b"), "a state"),
        "an OrderedDict of a list": (whole(b"ccollections\nOrderedDict\n]\x85R"), "with arguments"),
        "a tuple as a key": (saved({(1, 2): 3}), "type tuple"),
        "an array as a key": (whole(b"}" + RECONSTRUCT + b"K\x01s"), "type PickledArray"),
        "a key nested 100000 times": (whole(deep), "type tuple"),
        "a key that takes for ever to hash": (whole(twin), "type tuple"),
        "a key doubled by DUP": (whole(bomb), "opcode DUP"),
        "more opcodes than a file of masks has": (whole(b"N0" * 600_000), "opcode POP"),
        "a million opcodes": (whole(b"]" + b"N" * 1_100_000), "more than 1000000 opcodes"),
        "a place in the memo that is not there": (whole(b"j\xff\xff\xff\x7f"), "does not hold"),
        "an item of no dict": (whole(b"]K\x01K\x01s"), "no dict"),
        "an item of no list": (whole(b"}K\x01a"), "no list"),
        "more than is on the stack": (header() + b"\x80\x03\x87.", "more from its stack"),
        "no mark": (header() + b"\x80\x03t.", "lacks a mark"),
        "below the mark": (header() + b"\x80\x03K\x01(\x85.", "more from its stack"),
        "a set": (saved({"a": {1, 2}}), "opcode EMPTY_SET"),
        "a complex number": (saved({"a": 1j}), "'builtins.complex'"),
        "a bytearray": (saved({"a": bytearray(b"x")}), "'builtins.bytearray'"),
        "a torch tensor": (saved({"a": torch.ones(2)}), "tensor.cpu().numpy()"),
        "Python 2": (header() + b"\x80\x02}U\x08strategyq\x00}s.", "Python 2"),
        "Python 2's own array": (
            header() + b"\x80\x02" + RECONSTRUCT.replace(b"C\x01b", b"U\x01b") + b".",
            "Python 2",
        ),
        "protocol 0": (header() + pickle.dumps({"a": 1}, 0), "protocol"),
        "protocol 5": (header() + pickle.dumps({"a": np.ones(3)}, 5), "protocol"),
        "a dict that is no array": (header() + pickle.dumps({"a": 1}, 4), "one object that its header promises"),
        "a list": (saved(np.array([[1, "a"]], object)[0, :1]), "holds a int"),
        "text": (whole(b"X\x01\x00\x00\x00a"), "holds a str"),
        "two dicts": (saved(np.array([{}, {}], object)), "has a header"),
        "an array of numbers": (saved(np.ones(3)), "has a header"),
        "two objects left": (header() + b"\x80\x03NN.", "more than one object"),
        "more behind its end": (saved({"a": 1}) + b"x", "goes on behind its end"),
        "truncated": (saved({"a": np.ones(100)})[:-300], "breaks off"),
        "no opcode": (header() + b"\x80\x04\xff.", "breaks off or is damaged"),
        "a header alone": (header(), "protocol"),
        "nothing": (b"", "not a .npy file"),
        "another file": (b"PK\x03\x04" + bytes(100), "not a .npy file"),
        "another version": (b"\x93NUMPY\x04\x00" + saved({})[8:], "not a .npy file"),
        "a header longer than the file": (header(length=60_000) + b"\x80\x04N.", "says that its header"),
        "a header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "says that its header"),
        "a header with code": (header(evil_header), "has a header"),
        "a header of 10**12 objects": (header(long_header) + b"\x80\x04N.", "has a header"),
        "a header nested 3000 times": (header("(" * 3000), "has a header"),
    }  # fmt: skip


@pytest.fixture
def extension() -> Iterator[None]:
    """Somebody registered os.popen as extension 240, and used it: readers then push it with no look-up."""
    copyreg.add_extension("os", "popen", 0xF0)
    pickle.loads(b"\x80\x02\x82\xf0.")
    yield
    copyreg.remove_extension("os", "popen", 0xF0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("case", hostile(Path("ran")))
def test_a_hostile_file_is_refused_and_not_run(case: str, models: Models, tmp_path: Path) -> None:
    ran, outputs, source = tmp_path / "ran", tmp_path / "outputs", tmp_path / "released"
    outputs.mkdir()
    source.mkdir()
    data, named = hostile(ran)[case]
    (source / NPY).write_bytes(data)
    base, began = models("llama-multihead").path, time.monotonic()
    said = sentence(amoeba("checkpoint", "import", source, "--base", base, "-o", outputs / "made", "--quiet"), 2)
    assert time.monotonic() - began < 10
    assert not ran.exists()
    assert list(outputs.iterdir()) == []
    assert str(source / NPY) in said
    assert named in said
    if case.startswith("!"):
        with contextlib.suppress(Exception):
            np.load(source / NPY, allow_pickle=True)
        for _ in range(50):  # a process of its own may take a moment
            if ran.exists():
                break
            time.sleep(0.02)
        assert ran.exists(), "this file is no proof: Python's own reader does not run it either"


def test_a_missing_file_is_named(models: Models, tmp_path: Path) -> None:
    base = models("llama-multihead").path
    said = sentence(amoeba("checkpoint", "import", tmp_path, "--base", base, "-o", tmp_path / "made"), 2)
    assert NPY in said


def test_a_file_beyond_a_gibibyte_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as stream:
        stream.truncate((1 << 30) + 1)  # no block of it is on the disk
    with pytest.raises(BadInput, match="beyond the limit"):
        read_pickled_dict(tmp_path / "a.npy")


def test_damaged_files_are_read_or_refused_and_nothing_else(models: Models, tmp_path: Path) -> None:
    model, rng, file = models("llama-multihead"), random.Random(1), tmp_path / NPY
    whole_file = saved(make_released(model).strategy)
    # Opcodes are few beside numbers: most changes are made where opcodes are.
    opcodes = [place for place in range(128, len(whole_file)) if whole_file[place] not in (0, 0xF0, 0x3F)]
    read = 0
    for _ in range(300):
        data = bytearray(whole_file)
        for _ in range(rng.randint(1, 3)):
            data[rng.choice(opcodes)] = rng.choice([rng.randrange(256), *b"cRbsutaq\x93\x94\x85."])
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(bytes(data))
        try:
            strategy = _Strategy(file, model.architecture)
            strategy.depths(), strategy.masks()
            read += 1
        except BadInput as error:
            assert str(file) in str(error)
            assert "\n" not in str(error)
    assert read < 300
