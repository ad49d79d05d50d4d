#!/usr/bin/env bash
# Everything about prompts' attention that only a GPU can say, in one call of about eight minutes:
# right results over unmapped tails first, then the settings' sweep, then `bench attention`.
# Usage: scripts/experiments/prompts_on_gpu.sh [PYTHON] [FOLDER FOR RESULTS]
set -u
python=${1:-python3} out=${2:-${OUT:-.}}
for case in plans shapes splits life far; do
  for path in hopper plain; do
    echo "== kernel: $case, $path"
    timeout 120 "$python" tests/attention/prompts_probe.py cuda:0 "$case" "$path" 2>&1 | tail -3
  done
done
for layers in 1 32; do
  echo "== shares backend over unmapped tails, $layers layers a range"
  timeout 120 "$python" tests/attention/overread_probe.py shares "$layers" vattn 2>&1 | tail -1
done
echo "== settings"
timeout 280 "$python" scripts/experiments/tune_prompts.py --json "$out/tune_prompts.json" 2>&1 | tail -150 | tee "$out/tune_prompts.txt" | tail -12
echo "== bench attention"
timeout 200 "$python" -m trtllm_vattn bench attention --points 128x2048 --blocks 64 --picks 64 \
  --output-json "$out/attention.json" 2>&1 | tee "$out/attention.txt" | tail -45
