"""Rows that ``amoeba profile`` measured of three random Llamas, as data for tests of estimates.

Measured on 27 November 2026 on one core of a shared AMD EPYC (Zen 4, 24 GB), one thread, five repeats (three of model
c), with onnxruntime 1.32.0 and torch 2.13.0. In the same minutes the core multiplied a matrix with a vector at 12.8 to
16.2 GB/s and two matrices at 61 to 82 GFLOP/s in float32, the neighbours being busy: the rows are as noisy as such a
machine is.
"""

from __future__ import annotations

from amoeba_deploy.architecture import Architecture

MEASURED_BANDWIDTH = 12.8
"""GB/s."""
MEASURED_RATE = 63.0
"""GFLOP/s in fp32."""

MEASURED_MODELS = {
    "a": Architecture("llama", 8, 512, 8, 4, 64, 1376, 4096, 2048, tied=False),
    "b": Architecture("llama", 6, 768, 12, 4, 64, 2048, 8192, 2048, tied=False),
    "c": Architecture("llama", 10, 640, 10, 5, 64, 1728, 16000, 2048, tied=True),
}
"""Family, depth, hidden, heads, key/value heads, head_dim, neurons, vocabulary, context."""

MEASURED_ROWS = [
    ("a", "onnx", "fp32", "8x1", 119.2, 14.91),
    ("a", "onnx", "fp32", "8x0.5", 66.6, 7.21),
    ("a", "onnx", "fp32", "6x0.75", 69.4, 7.82),
    ("a", "onnx", "fp32", "4x1", 68.0, 8.16),
    ("a", "onnx", "fp32", "4x0.5", 38.3, 4.55),
    ("a", "onnx", "int4", "8x1", 146.0, 3.92),
    ("a", "onnx", "int4", "8x0.5", 79.2, 2.47),
    ("a", "onnx", "int4", "6x0.75", 85.6, 2.71),
    ("a", "onnx", "int4", "4x1", 74.5, 2.19),
    ("a", "onnx", "int4", "4x0.5", 45.5, 1.17),
    ("a", "torch", "fp32", "8x1", 155.3, 22.58),
    ("a", "torch", "fp32", "8x0.5", 92.2, 14.41),
    ("a", "torch", "fp32", "6x0.75", 103.9, 13.24),
    ("a", "torch", "fp32", "4x1", 75.6, 10.53),
    ("a", "torch", "fp32", "4x0.5", 56.0, 8.24),
    ("b", "onnx", "fp32", "6x1", 185.4, 23.44),
    ("b", "onnx", "fp32", "6x0.5", 106.7, 13.78),
    ("b", "onnx", "fp32", "5x0.75", 124.5, 14.39),
    ("b", "onnx", "fp32", "3x1", 103.4, 12.61),
    ("b", "onnx", "fp32", "3x0.5", 65.1, 7.92),
    ("b", "onnx", "int4", "6x1", 197.0, 5.29),
    ("b", "onnx", "int4", "6x0.5", 123.6, 3.59),
    ("b", "onnx", "int4", "5x0.75", 116.7, 3.44),
    ("b", "onnx", "int4", "3x1", 114.9, 3.05),
    ("b", "onnx", "int4", "3x0.5", 70.4, 1.78),
    ("b", "torch", "fp32", "6x1", 247.5, 27.68),
    ("b", "torch", "fp32", "6x0.5", 148.2, 16.93),
    ("b", "torch", "fp32", "5x0.75", 173.7, 21.67),
    ("b", "torch", "fp32", "3x1", 143.6, 16.33),
    ("b", "torch", "fp32", "3x0.5", 96.9, 12.70),
    ("c", "onnx", "fp32", "10x1", 226.9, 24.69),
    ("c", "onnx", "fp32", "10x0.5", 147.7, 16.58),
    ("c", "onnx", "fp32", "8x0.75", 146.2, 16.29),
    ("c", "onnx", "fp32", "5x1", 127.5, 13.56),
    ("c", "onnx", "fp32", "5x0.5", 94.2, 9.35),
    ("c", "onnx", "int4", "10x1", 250.1, 7.10),
    ("c", "onnx", "int4", "10x0.5", 129.7, 4.09),
    ("c", "onnx", "int4", "8x0.75", 186.8, 5.55),
    ("c", "onnx", "int4", "5x1", 121.0, 3.79),
    ("c", "onnx", "int4", "5x0.5", 104.5, 3.14),
    ("c", "torch", "fp32", "10x1", 306.0, 38.06),
    ("c", "torch", "fp32", "10x0.5", 190.2, 23.99),
    ("c", "torch", "fp32", "8x0.75", 214.5, 24.72),
    ("c", "torch", "fp32", "5x1", 216.0, 19.44),
    ("c", "torch", "fp32", "5x0.5", 116.4, 15.83),
]
"""Model, flow, precision, shape, TTFT and TPOT in milliseconds: prompts of 128 tokens, 32 generated, batch 1."""
