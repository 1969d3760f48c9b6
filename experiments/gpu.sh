#!/usr/bin/env bash
# What a GPU is asked, in at most eight minutes: docs/scaling.md has what it printed.
#     bash experiments/gpu.sh                 # on a GPU: the default run, then the published sizes
#     bash experiments/gpu.sh sd1 tiny,sd1    # small bases: a trial on a CPU
# The bases of experiments/real_sizes.py, then those of experiments/speed.py.
real=${1:-sd15,sdxl,sd35}
against=${2:-tiny,sd15,sd35}
cd "$(dirname "$0")/.." || exit 1
export HF_HUB_OFFLINE=1
out=$(mktemp -d)
finish() { kill $(jobs -p) 2>/dev/null; rm -rf "$out"; }
trap finish EXIT

# At most $1 seconds; what a stopped command leaves in its scratch folder, gigabytes, is removed.
stage() {
    mkdir "$out/scratch"
    TMPDIR="$out/scratch" timeout "$@"
    rm -rf "$out/scratch"
}

# Memory is counted on the CPU meanwhile.
for base in sd15 sdxl sd35-512; do
    python experiments/memory.py --bases "$base" >"$out/$base.txt" &
done
python -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"

echo "== the default run"
start=$SECONDS
python train.py --out "$out/default" | tail -n 12
echo "$((SECONDS - start)) s"

echo "== three updates at published sizes"
stage 200 python experiments/real_sizes.py --bases "$real"

echo "== against a plain loop"
stage 150 python experiments/speed.py --bases "$against" --processes 0 --repeats 2 --guidance 4

echo "== all weights, and compiled"
stage 150 python experiments/real_sizes.py --bases "${real%%,*}" --more

echo "== memory, counted"
cat "$out"/*.txt
