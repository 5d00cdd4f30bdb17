#!/bin/sh
# The main job on the checkpoint that ships in the package; `make demo` runs this with the virtual environment's bin.
set -eu
PATH=$1:$PATH
rm -rf build/demo
mkdir -p build/demo

show() {
    printf '\n$ %s\n' "$1"
    eval "$1"
}

show 'amoeba checkpoint verify'
show 'amoeba export --device orin-nx --latency 40ms -o build/demo/orin'
show 'amoeba bundle verify build/demo/orin'
show 'amoeba run build/demo/orin -p "Question: What is the job of Faiven? Answer:" --tokens 2'
show 'amoeba search --config docs/examples/llama-2-7b.json --device orin-nx --precision int4 --latency 40ms --top 3'
