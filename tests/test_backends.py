"""Every backend passes the suite of the package; flows of other packages are found by their entry points."""

from __future__ import annotations

from amoeba_deploy.backends.conformance import Conformance


class TestTorch(Conformance):
    flow = "torch"


class TestOnnx(Conformance):
    flow = "onnx"
