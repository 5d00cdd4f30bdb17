"""What two shapes of one checkpoint share in a registry: ``python -m benchmarks.shared_layers [CHECKPOINT]``.

Bundles of two shapes are built for each engine. A registry keeps one blob a file, so what is not sent for the second
bundle are its files that the first one has too, byte for byte. Beside it stands the limit: the share of what no shape
changes, which is everything outside the blocks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from amoeba_deploy.bundle import bundle_files
from amoeba_deploy.checkpoint import open_checkpoint
from amoeba_deploy.exported import export_answer
from amoeba_deploy.files import sha256_of
from amoeba_deploy.progress import Progress
from amoeba_deploy.request import Request
from amoeba_deploy.space import Space

ENGINES = ("onnx:fp32", "onnx:int8", "onnx:int4", "torch:fp32", "gguf:q8_0", "openvino:int8")


def main() -> None:
    parser = argparse.ArgumentParser(description="What two shapes of a checkpoint share in a registry.")
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--shapes", default="12x0.75,10x0.75")
    parser.add_argument("--engines", default=",".join(ENGINES))
    arguments = parser.parse_args()
    checkpoint, shapes = open_checkpoint(arguments.checkpoint), arguments.shapes.split(",")
    quiet = Progress(quiet=True)
    print(f"{checkpoint.name}: {shapes[1]} after {shapes[0]}")
    print(f"{'engine':16} {'bundle':>10} {'not sent':>10} {'share':>7} {'limit':>7}")
    for engine in arguments.engines.split(","):
        flow, _, precision = engine.partition(":")
        asked = {
            "device": "epyc-zen4-2",
            "latency": None,
            "metric": "tpot",
            "memory": None,
            "tpot": None,
            "ttft": None,
            "e2e": None,
            "size": None,
            "max_loss": None,
            "flow": flow,
            "precision": precision,
            "table": (),
            "measured_only": False,
            "settings": (),
            "batch": 1,
            "prompt": 128,
            "tokens": 32,
            "context": None,
        }
        with tempfile.TemporaryDirectory() as work:
            found: list[dict[str, tuple[str, int]]] = []
            for index, shape in enumerate(shapes):
                output = Path(work, str(index))
                request = Request.of(Space.of_checkpoint(checkpoint), asked, quiet, shape)
                export_answer(checkpoint, request, output, force=False, verify=False)
                found.append({f: (sha256_of(output / f), (output / f).stat().st_size) for f in bundle_files(output)})
                subnet = request.plan(flow, precision)
            assert subnet is not None
            sizes = subnet.subnet(checkpoint.architecture)
            known = {digest for digest, _ in found[0].values()}
            total = sum(size for _, size in found[1].values())
            shared = sum(size for digest, size in found[1].values() if digest in known)
            limit = 1 - sizes.depth * sizes.block_parameters / sizes.parameters
            print(f"{engine:16} {total / 1e6:7.2f} MB {shared / 1e6:7.2f} MB {shared / total:7.1%} {limit:7.1%}")


if __name__ == "__main__":
    main()
