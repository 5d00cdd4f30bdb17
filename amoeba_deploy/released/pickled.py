"""Numbers out of a pickle that others wrote, without unpickling it: the ``.npy`` file of one dict of arrays.

``numpy.save`` of a dict stores an array of one object, and that object as a pickle. A pickle is a program: Python's own
reader imports what it names and calls it. This reader does neither. It interprets the opcodes that pickle protocols 2
to 4 need for numbers, text, lists, tuples, dicts and numpy arrays, and refuses any other. The five names that such a
file holds are compared as text and looked up nowhere; numpy sees bytes of a checked length and a dtype from a fixed
list, never an object or a state that the file made.

Everything is bounded by the file: arrays are views of its bytes, so a shape that claims more than is there is refused;
the numbers of bytes and of opcodes have a limit; keys of dicts are text or numbers, so that no nesting is ever hashed;
nothing here recurses.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.errors import BadInput

_MOST_BYTES = 1 << 30
_MOST_OPCODES = 1_000_000
# The header exactly as numpy.save writes it for one object, in its three versions; the first two differ in the bytes
# that say how long it is.
_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}
_MOST_HEADER = 10_000
_HEADER = re.compile(rb"\{'descr': '\|O', 'fortran_order': False, 'shape': \((1,)?\), \} *\n")

_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_OBJECT_DTYPES = ("O", "O8")
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
"""How numpy 1 and numpy 2 name one module."""


class _Refused(Exception):
    """Half a sentence that says why a pickle is not read."""


class _Name:
    """A name of numpy's or of the standard library, as text; it stands for nothing that could be called."""

    def __init__(self, text: str) -> None:
        self.text = text


_NAMES = {
    **{(module, name): name for module in _MULTIARRAY for name in ("_reconstruct", "scalar")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("collections", "OrderedDict"): "OrderedDict",
}


class _Type:
    """A dtype of the file: its code, such as ``f8``, and once its state was read what numpy calls it."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.dtype: np.dtype[Any] | None = None
        self.is_object = False


class PickledArray:
    """An array of the file; its numbers are there once its state was read."""

    def __init__(self) -> None:
        self.values: NDArray[Any] | None = None
        self.content: list[Any] | None = None
        """The one object of the outermost array."""


def _refuse(reason: str) -> NoReturn:
    raise _Refused(reason)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


class _Reader:
    """The stack machine of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.has_object_array = False

    # The stack

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            _refuse("takes more from its stack than it put there")
        return self.stack.pop()

    def top(self) -> Any:
        found = self.pop()
        self.stack.append(found)
        return found

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            _refuse("lacks a mark")
        begin = self.marks.pop()
        found = self.stack[begin:]
        del self.stack[begin:]
        return found

    # What opcodes do

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            _refuse("appends to what is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            _refuse("sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float):
                _refuse(f"has a key of type {type(key).__name__} in a dict, where text and numbers belong")
            target[key] = value

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            _refuse("refers to what it does not hold")
        self.stack.append(self.memo[index])

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            _refuse("names something by what is no text")
        if module == "torch" or module.startswith("torch."):
            _refuse(
                f"holds torch tensors ({_shown(f'{module}.{name}')}); where you trust it, load it in Python and save "
                f"it again with every tensor as tensor.cpu().numpy()"
            )
        if (module, name) not in _NAMES:
            named = _shown(f"{module}.{name}")
            _refuse(f"calls for {named}, which is no part of numpy's arrays; nothing of it was run")
        self.stack.append(_Name(_NAMES[module, name]))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or type(function) is not _Name:
            _refuse("calls what is no part of numpy's arrays; nothing of it was run")
        calls = {"_reconstruct": _blank, "dtype": _dtype, "scalar": _scalar, "OrderedDict": _ordered_dict}
        if function.text not in calls:
            _refuse(f"calls {function.text} as numpy never does; nothing of it was run")
        self.stack.append(calls[function.text](arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(state) is not tuple:
            _refuse("gives a state that is no tuple")
        if type(target) is _Type:
            _build_dtype(target, state)
        elif type(target) is PickledArray:
            if _is_object_array(state):
                if self.has_object_array or len(self.stack) > 1 or self.marks:
                    _refuse("holds an array of objects inside another, where arrays of numbers belong")
                self.has_object_array = True
            _build_array(target, state)
        else:
            _refuse("gives a state to what has none; nothing of it was run")

    def step(self, opcode: str, argument: Any) -> None:
        """Do one opcode."""
        if opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _TUPLES:
            self.tuple_of(_TUPLES[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.put(argument)
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.get(argument)
        elif opcode == "MEMOIZE":
            self.put(len(self.memo))
        elif opcode == "MARK":
            self.marks.append(len(self.stack))
        elif opcode == "TUPLE":
            self.stack.append(tuple(self.pop_mark()))
        elif opcode == "APPEND":
            self.append([self.pop()])
        elif opcode == "APPENDS":
            self.append(self.pop_mark())
        elif opcode == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif opcode == "SETITEMS":
            self.set_items(self.pop_mark())
        elif opcode == "GLOBAL":
            self.name(*argument.split(" ", 1))
        elif opcode == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            self.name(module, name)
        elif opcode == "REDUCE":
            self.call()
        elif opcode == "BUILD":
            self.build()
        elif opcode in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
            _refuse("was pickled by Python 2; load it there and save it again with Python 3")
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            _refuse(f"has the opcode {opcode}, which no dict of numpy arrays needs; nothing of it was run")


_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_VALUES |= {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _types(values: tuple[Any, ...]) -> tuple[type, ...]:
    return tuple(type(value) for value in values)


def _blank(arguments: tuple[Any, ...]) -> PickledArray:
    """``_reconstruct(ndarray, (0,), b"b")``, which is all that numpy ever writes: an array without its state."""
    if _types(arguments) != (_Name, tuple, bytes) or arguments[0].text != "ndarray":
        _refuse("makes an array as numpy never does")
    if _types(arguments[1]) != (int,) or arguments[1] != (0,) or arguments[2] != b"b":
        _refuse("makes an array as numpy never does")
    return PickledArray()


def _dtype(arguments: tuple[Any, ...]) -> _Type:
    """``dtype(code, False, True)``."""
    if len(arguments) != 3 or type(arguments[0]) is not str:
        _refuse("makes a dtype as numpy never does")
    if arguments[0] not in _DTYPES + _OBJECT_DTYPES:
        _refuse(f"has the dtype {_shown(arguments[0])}, where whole numbers, floats and truth values are known")
    return _Type(arguments[0])


def _scalar(arguments: tuple[Any, ...]) -> float | int:
    """``scalar(dtype, bytes)``: one number."""
    if _types(arguments) != (_Type, bytes):
        _refuse("makes a number as numpy never does")
    kind, data = arguments
    if kind.dtype is None or len(data) != kind.dtype.itemsize:
        _refuse("holds a number that its dtype contradicts")
    found = np.frombuffer(data, kind.dtype)[0].item()
    return int(found) if isinstance(found, bool) else found


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments != ():
        _refuse("makes an OrderedDict with arguments")
    return {}


def _build_dtype(target: _Type, state: tuple[Any, ...]) -> None:
    """``(3, byte order, None, None, None, -1, -1, flags)``: no fields, no metadata, no subarray."""
    plain = (int, str, type(None), type(None), type(None), int, int, int)
    if target.dtype is not None or target.is_object or _types(state) != plain or state[0] != 3:
        _refuse("describes a dtype as numpy never does for numbers")
    if state[1] not in ("<", ">", "|") or state[5:7] != (-1, -1):
        _refuse("describes a dtype as numpy never does for numbers")
    if target.code in _OBJECT_DTYPES:
        target.is_object = True
    else:
        target.dtype = np.dtype(state[1] + target.code)


def _is_object_array(state: tuple[Any, ...]) -> bool:
    return len(state) == 5 and type(state[2]) is _Type and state[2].is_object


def _build_array(target: PickledArray, state: tuple[Any, ...]) -> None:
    """``(1, shape, dtype, whether columns come first, bytes)``; a list of one in place of bytes for an object."""
    if target.values is not None or target.content is not None:
        _refuse("gives one array two states")
    if _types(state)[:4] != (int, tuple, _Type, bool) or len(state) != 5 or state[0] != 1:
        _refuse("describes an array as numpy never does")
    _, shape, kind, by_columns, data = state
    if any(type(extent) is not int or extent < 0 for extent in shape) or len(shape) > 8:
        _refuse("has an array of a shape that cannot be")
    if kind.is_object:
        if shape not in ((), (1,)) or type(data) is not list or len(data) != 1:
            _refuse("holds an array of several objects, where one dict belongs")
        target.content = data
        return
    if type(data) is not bytes or kind.dtype is None:
        _refuse("describes an array as numpy never does")
    if math.prod(shape) * kind.dtype.itemsize != len(data):
        claimed = "x".join(str(extent)[:20] for extent in shape) or "1"
        _refuse(f"claims an array of {claimed} numbers and holds {len(data)} bytes of it")
    target.values = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if by_columns else "C")


def _loads(data: bytes) -> Any:
    """The one object of the outermost array of a pickle."""
    reader, end = _Reader(), 0
    if data[:1] != b"\x80" or data[1:2] not in (b"\x02", b"\x03", b"\x04"):
        _refuse("is not a pickle of protocol 2, 3 or 4, which numpy.save writes")
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count == _MOST_OPCODES:
                _refuse(f"has more than {_MOST_OPCODES} opcodes, far beyond what a dict of masks needs")
            reader.step(opcode.name, argument)
            end = (position or 0) + 1
    except ValueError:
        _refuse("breaks off or is damaged")
    if end != len(data):
        _refuse("goes on behind its end")
    if len(reader.stack) != 1 or reader.marks:
        _refuse("leaves more than one object")
    found = reader.stack[0]
    if type(found) is not PickledArray or found.content is None:
        _refuse("is not the array of one object that its header promises")
    return found.content[0]


def _pickle_of(data: bytes) -> bytes:
    """What stands behind the header of a ``.npy`` file of one object."""
    count = _LENGTH_BYTES.get(data[6:8])
    if data[:6] != _MAGIC or count is None:
        _refuse("is not a .npy file of numpy")
    begin = 8 + count
    length = int.from_bytes(data[8:begin], "little")
    if length > _MOST_HEADER or begin + length > len(data):
        _refuse(f"says that its header takes {length} bytes, of {len(data)} in all")
    if _HEADER.fullmatch(data[begin : begin + length]) is None:
        _refuse("has a header that does not describe one pickled object, as numpy.save writes for a dict")
    return data[begin + length :]


def read_pickled_dict(file: Path) -> dict[Any, Any]:
    """The dict in a ``.npy`` file that ``numpy.save`` wrote: of text, numbers, lists, tuples, dicts, ``PickledArray``.

    Nothing that the file names is imported or called.

    Raises:
        BadInput: the file is missing or damaged, or holds anything else.
    """
    try:
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise BadInput(f"{file}: has {size} bytes, beyond the limit of {_MOST_BYTES} for a file of masks")
        found = _loads(_pickle_of(file.read_bytes()))
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    except _Refused as refused:
        raise BadInput(f"{file}: {refused}; it is not read") from None
    if type(found) is not dict:
        raise BadInput(f"{file}: holds a {type(found).__name__} where one dict belongs; it is not read")
    return found
