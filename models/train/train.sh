#!/usr/bin/env bash
# Makes the shipped model from nothing: data, training, export, gates. Needs one Hopper GPU with PyTorch 2.11.
# Usage: models/train/train.sh OUT_DIR [MINUTES]   (training time; 7.1 made the shipped weights)
# Run again after an interruption: training goes on from OUT_DIR/run/checkpoint.pt.
set -euo pipefail
if [[ $# -lt 1 ]]; then
  echo "usage: $0 OUT_DIR [MINUTES]" >&2
  exit 2
fi
out=$1
minutes=${2:-7.1}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$out"
if [[ ! -f $out/data/data_manifest.json ]]; then
  python3 "$here/build_data.py" --out "$out/data"
fi
python3 "$here/train.py" --data "$out/data" --out "$out/run" --minutes "$minutes"
python3 "$here/export.py" --checkpoint "$out/run/checkpoint.pt" --data "$out/data" --out "$out/model"
python3 "$here/evaluate.py" --model "$out/model" --data "$out/data" --out "$out/model/evaluation.json"
cp "$out/run/log.jsonl" "$out/model/training_log.jsonl"
python3 "$here/report.py" --evaluation "$out/model/evaluation.json" --out "$out/model/evaluation.md"
python3 "$here/plot_log.py" --log "$out/run/log.jsonl" --out "$out/model/training_curve.png"
