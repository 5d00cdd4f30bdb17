"""A stand-in for the command ``mlc_llm``, so that what Amoeba makes of its output can be tested without it.

It writes the files of MLC-LLM 0.1's three commands for q0f16, q0f32 and Llama, and can be told by ``$FAKE_MLC`` to go
wrong in one way, mostly as the real one does: with exit status 0.
"""

import argparse
import json
import os
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FAULT = os.environ.get("FAKE_MLC", "")
MACHINES = {"x86_64": 62, "aarch64": 183}
LIMITS = ("context_window_size", "prefill_chunk_size", "max_batch_size")


def stored(config, weights):
    """MLC's tensors by their names."""
    found = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}
    for index in range(config["num_hidden_layers"] - (FAULT == "fewer blocks")):
        block = f"model.layers.{index}."
        heads = [weights[f"{block}self_attn.{part}_proj.weight"] for part in "qkv"]
        wide = [weights[f"{block}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        found[f"{block}self_attn.qkv_proj.weight"] = np.concatenate(heads)
        found[f"{block}mlp.gate_up_proj.weight"] = np.concatenate(
            wide[::-1] if FAULT == "gate and up swapped" else wide
        )
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"):
            found[f"{block}{name}.weight"] = weights[f"{block}{name}.weight"]
    found["model.norm.weight"] = weights["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = weights["lm_head.weight"]
    return found


def convert_weight(given):
    config = json.loads((Path(given.config) / "config.json").read_text())
    dtype = "float16" if given.quantization == "q0f16" else "float32"
    records, data = [], b""
    for name, value in stored(config, load_file(Path(given.source) / "model.safetensors")).items():
        raw = value.astype(dtype)
        if dtype == "float32":  # as MLC does: the upper half of each number
            raw = (raw.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
        entry = {"name": name, "shape": list(value.shape), "dtype": dtype, "format": "f32-to-bf16"}
        records.append(entry | {"nbytes": raw.nbytes, "byteOffset": len(data)})
        data += raw.tobytes()
    folder = Path(given.output)
    (folder / "params_shard_0.bin").write_bytes(data[: -1 if FAULT == "short shard" else None])
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": len(data), "records": records}
    (folder / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": [shard]}))
    (folder / "tensor-cache-b16.json").write_text("{}")


def gen_config(given):
    config = json.loads((Path(given.config) / "config.json").read_text())
    inner = {key: config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")}
    inner |= {key: config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")}
    inner |= {"tie_word_embeddings": config["tie_word_embeddings"]}
    older = FAULT != "rotary settings lost"  # MLC reads the older spelling alone
    inner["position_embedding_base"] = config.get("rope_theta", 10000) if older else 10000
    inner["rope_scaling"] = config.get("rope_scaling") if older else None
    inner |= {key: getattr(given, key) for key in LIMITS}
    value = {"model_type": given.model_type, "quantization": given.quantization, "model_config": inner}
    value["conv_template"] = {"system_prefix_token_ids": [1], "stop_token_ids": [2]}
    (Path(given.output) / "mlc-chat-config.json").write_text(json.dumps(value))


def compile(given):  # noqa: A001
    folder, output = Path(given.config).parent, Path(given.output)
    config = json.loads((folder / "mlc-chat-config.json").read_text())
    inner = config["model_config"]
    cache = json.loads((folder / "tensor-cache.json").read_text())
    params = [{key: record[key] for key in ("name", "shape", "dtype")} for record in cache["records"][0]["records"]]
    kept = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    heads = {key: inner[key] for key in kept}
    heads["num_hidden_layers"] -= FAULT == "library of fewer blocks"
    facts = {"model_type": config["model_type"], "quantization": config["quantization"]}
    facts |= {key: inner[key] for key in LIMITS} | {"kv_cache": heads, "params": params}
    machine = "aarch64" if "aarch64" in given.device or "android" in given.device else "x86_64"
    if FAULT == "another processor":
        machine = "x86_64" if machine == "aarch64" else "aarch64"
    code = b"\x7fELF" + bytes(14) + MACHINES[machine].to_bytes(2, "little") + bytes(44)
    if '"cuda"' in given.device:
        code += b'extern "C" __global__ void f() {}' if FAULT == "no fat binary" else b"\x50\xed\x55\xba" + bytes(16)
    code += json.dumps(facts).encode() + bytes(8)
    if FAULT == "nothing written":
        return
    if FAULT == "CUDA source" or output.suffix == ".tar":
        name, data = ("lib0.o", code) if FAULT != "CUDA source" else ("lib0.cu", b'extern "C" __global__ void f() {}')
        member = output.parent / name
        member.write_bytes(data)
        with tarfile.open(output, "w") as archive:
            archive.add(member, name)
        member.unlink()
        return
    output.write_bytes(code)


def main():
    parser = argparse.ArgumentParser()
    for name in ("command", "config"):
        parser.add_argument(name)
    for name in ("quantization", "model-type", "device", "source", "source-format", "output", "conv-template", "opt"):
        parser.add_argument(f"--{name}")
    for name in LIMITS:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    given = parser.parse_args()
    print(f"{given.command} begins", flush=True)
    if f"fails in {given.command}" == FAULT:
        print("\x1b[31mValueError: something odd\x1b[0m\nnote: run again")
        sys.exit(1)
    if f"killed in {given.command}" == FAULT:
        os.kill(os.getpid(), signal.SIGKILL)
    if f"disk full in {given.command}" == FAULT:
        (Path(given.output).parent / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    {"convert_weight": convert_weight, "gen_config": gen_config, "compile": compile}[given.command](given)


main()
