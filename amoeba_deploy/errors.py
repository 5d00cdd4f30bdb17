"""The failures that a user can cause or meet, each with its exit code.

Every message is one sentence that says what was found, where, and what to do. The command line prints it and exits
with ``exit_code``; a traceback appears only with ``--debug``.
"""

from __future__ import annotations


class AmoebaError(Exception):
    """Any failure that Amoeba expects; the base of those below."""

    exit_code = 1


class BadInput(AmoebaError):
    """Wrong usage, or a file that is missing, damaged or not what it should be."""

    exit_code = 2


class NoShapeFits(AmoebaError):
    """No shape fits the budget; the message names the closest one and what bounds it."""

    exit_code = 3


class LatencyUnknown(AmoebaError):
    """No latency is known for a device and flow, or only an estimate where a measurement was demanded."""

    exit_code = 4


class VerificationFailed(AmoebaError):
    """An artefact does not do what it should: numbers, digests or signatures differ."""

    exit_code = 5


class ToolchainMissing(AmoebaError):
    """An engine's toolchain is not installed; the message says how to get it."""

    exit_code = 6


def with_code(exit_code: int, message: str) -> AmoebaError:
    """A failure of the class that has an exit code; the base class where none has it."""
    kinds = (BadInput, NoShapeFits, LatencyUnknown, VerificationFailed, ToolchainMissing)
    return next((kind for kind in kinds if kind.exit_code == exit_code), AmoebaError)(message)
