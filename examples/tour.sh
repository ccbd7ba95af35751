#!/bin/sh
# The main job on the examples: check, build, verify, search. Writes into runs/tour.
set -eu
cd "$(dirname "$0")/.."
mkdir -p runs/tour

headloom check examples/*.loom examples/*.yaml
headloom show examples/sliding_window.loom
headloom build examples/gqa.loom -o runs/tour/gqa.py
headloom verify examples/gqa.loom
headloom search examples/search_mqar.loom --out runs/tour/search
