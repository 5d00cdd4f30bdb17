from amoeba_deploy.backends.conformance import Conformance


class TestOpenvino(Conformance):
    flow = "openvino"
