#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in one command on a machine that has no network and not all packages.
#
#   tests/benchmarks/gpu_session.sh --parts tests,latency
#   tests/benchmarks/gpu_session.sh --parts sweep,table --box table=300 --plan sweep=tests/benchmarks/plans/rates.toml
#   tests/benchmarks/gpu_session.sh --parts sweep,table --background tests,recipes
#   tests/benchmarks/gpu_session.sh --rehearse
#
# Parts, each in a time box of its own and with a report that is written as it goes:
#   tests      pytest tests/gpu
#   latency    the FFN layer and TinyLlama's shape as CUDA graphs
#   sweep      a plan of bench_routing.py: options, chosen on the selection text
#   table      another one: the report
#   long       a finetune of as many tokens as fit, and its static control
#   recipes    the paper's table and the unseen domains, as `factorctl run` makes them, at half a million tokens
#   references what PAR's loss can fall to, of routed experts and of clusters of gate rows
#   constants  sizes of batches
#   compiled   TinyLlama's shape once more, decoding as torch.compile makes it: minutes of compiling
# Parts that time nothing may run in the background of the others. Reports go to $OUT, or to runs/gpu-session. What gpu_bundle.py packed is read from .gpu. A rehearsal runs all of it on a
# CPU with a tiny model, and unpacks a bundle only where --carried names one.
set -uo pipefail
cd "$(dirname "$0")/../.."

declare -A BOX=([tests]=100 [latency]=150 [sweep]=200 [table]=300 [long]=240 [constants]=60
              [compiled]=120 [recipes]=540 [references]=300)
declare -A PLAN=([sweep]=tests/benchmarks/plans/rates.toml [table]=tests/benchmarks/plans/table.toml
                 [long]=tests/benchmarks/plans/long.toml)
PARTS= REHEARSE= ROUTED=routed CARRIED= PYTHON=python3 WORKERS=8 WORK= BACKGROUND=
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) REHEARSE=yes; shift; continue ;;
    --parts) PARTS=$2 ;;
    --box) BOX[${2%%=*}]=${2#*=} ;;
    --plan) PLAN[${2%%=*}]=${2#*=} ;;
    --routed) ROUTED=$2 ;;
    --workers) WORKERS=$2 ;;
    --carried) CARRIED=$2 ;;
    --work) WORK=$2 ;;
    --background) BACKGROUND=$2 ;;
    --python) PYTHON=$2 ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
if [ -n "$REHEARSE" ]; then  # in boxes that a machine with other work does not burst
  PARTS=${PARTS:-tests,latency,sweep,recipes,references,long,constants,compiled}
  for part in "${!BOX[@]}"; do BOX[$part]=$((8 * BOX[$part])); done
fi
PARTS=${PARTS:-tests,latency,sweep,table}
OUT=${OUT:-runs/gpu-session}
mkdir -p "$OUT"
rm -f "$OUT/failed"
if [ -z "$WORK" ]; then  # half-gigabyte checkpoints by the dozen: in memory where there is room
  free=$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)
  if [ "${free:-0}" -gt 25000000 ] && [ -z "$REHEARSE" ]; then WORK=/dev/shm/factorctl; else WORK=/tmp/factorctl-gpu; fi
fi
export FACTORCTL_CACHE=$WORK/cache PYTHONPATH=$PWD:$WORK/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export HF_HOME=$WORK/huggingface TOKENIZERS_PARALLELISM=true
# POT makes an array backend of everything that is installed, and JAX then takes three quarters of the GPU.
export POT_BACKEND_DISABLE_JAX=1 POT_BACKEND_DISABLE_CUPY=1 POT_BACKEND_DISABLE_TENSORFLOW=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false

say() { echo "== $* (after ${SECONDS} s)" | tee -a "$OUT/session.log"; }

run() {  # run PART SECONDS FILE COMMAND...: output shown and kept; what fails or takes too long ends no other part
  local part=$1 seconds=$2 file=$3 code
  shift 3
  say "$part begins, at most $seconds s"
  timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$OUT/$file"
  code=${PIPESTATUS[0]}
  say "$part ended with $code"
  [ "$code" = 0 ] || echo "$part" >> "$OUT/failed"
}

wanted() { [[ ",$PARTS," == *",$1,"* ]]; }

if [ -n "$REHEARSE" ]; then
  MODEL=$WORK/model DATA=$WORK/text TASKS=$WORK/bench DEVICE=cpu WORKERS=1
  PLAN=([sweep]=tests/benchmarks/plans/rehearsal.toml [table]=tests/benchmarks/plans/rehearsal.toml
        [long]=tests/benchmarks/plans/rehearsal.toml)
  SIZES="--calibration-tokens 256 --heldout-tokens 64 --measured-tokens 512 --curve-tokens 256 --document-tokens 64
         --block-length 64 --task-limit 2"
  TESTS="--collect-only -qq" FFN="--models SmolLM2-135M --tokens 2 --compiled="
  LATENCY="--width 64 --layers 1 --batch 2 --prompt 8 --context 4 --top-k 1"
  COMPILED="--width 64 --layers 1 --prompt 8 --rounds 1"
  RECIPES="--only paper-table/1R4E3K,unseen-domains/routed --set model=\"$WORK/model\" --set tokens=256 --set limit=2
           --set calibration-tokens=256 --set data-tokens=512 --set document-tokens=64"
  REFERENCES="--tokens 256 --heldout-tokens 64 --block-length 64"
  CALIBRATED=256
  CONSTANTS="--micro-tokens 128 --block-length 64 --batch-tokens 256 --evaluated-tokens 512"
  mkdir -p "$WORK"
  [ -n "$CARRIED" ] && $PYTHON tests/benchmarks/gpu_stage.py "$CARRIED" "$WORK" 2>&1 | tee -a "$OUT/session.log"
  $PYTHON tests/benchmarks/gpu_rehearsal.py "$WORK" | tee -a "$OUT/session.log"
else
  MODEL=demo DATA=$WORK/text TASKS=$WORK/bench DEVICE=cuda
  SIZES="" TESTS="-n 6 --durations=8" FFN="" LATENCY="" CONSTANTS="" COMPILED="" REFERENCES="" CALIBRATED=16K
  RECIPES="--set tokens=500000 --set limit=300 --set data-tokens=65536 --set document-tokens=1024"
  $PYTHON tests/benchmarks/gpu_stage.py "${CARRIED:-.gpu}" "$WORK" 2>&1 | tee -a "$OUT/session.log"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | tee -a "$OUT/session.log"
fi
say "ready: $(nproc) cores, work in $WORK, parts $PARTS"

pack() {  # few files come back from a machine
  (cd "$WORK" && find routing recipes \( -name 'worker-*.log' -o -path 'recipes/*.log' -o -path 'recipes/*.md' \
    -o -path '*/eval/eval.md' -o -path '*/eval/results.json' \) -type f 2>/dev/null) | tar czf "$OUT/workers.tar.gz" -C "$WORK" -T -
}

routing() {  # routing PART SHARDS WORKERS: its plan, all results of the session in one file
  run "$1" "${BOX[$1]}" routing.log $PYTHON tests/benchmarks/bench_routing.py run --plan "${PLAN[$1]}" \
    --routed "$ROUTED" --model "$MODEL" --data "$DATA" --tasks "$TASKS" --train-files "$2" --device "$DEVICE" \
    --workers "$3" --seconds $((BOX[$1] * 85 / 100)) --work "$WORK/routing" --copy "$OUT/cells.jsonl" $SIZES
  pack
  $PYTHON tests/benchmarks/bench_routing.py report --work "$WORK/routing" --out "$OUT/routing.md"
}

latency() {  # latency SECONDS WHAT OPTIONS...
  run latency "$1" latency.log $PYTHON tests/benchmarks/bench_gpu_latency.py "$2" --device "$DEVICE" "${@:3}" \
    --out "$OUT/latency.md"
}

recipes() {
  run recipes "${BOX[recipes]}" routing.log $PYTHON tests/benchmarks/gpu_recipes.py docs/paper-table docs/unseen-domains \
    --home "$WORK" --seconds $((BOX[recipes] * 95 / 100)) $RECIPES
  pack
}

references() {  # of a split's own experts, and of those that knew nothing of routers when they were made
  local strategy base
  for strategy in routed clustered; do
    base=$WORK/references/$strategy
    run references "${BOX[references]}" routing.log $PYTHON -m factorctl factorize "$MODEL" --experts 8 --top-k 3 \
      --shared-fraction 0.25 --strategy $strategy --router analytic --refit --calibration "$DATA/train-00.jsonl.xz" \
      --calibration-tokens $CALIBRATED --device "$DEVICE" --out "$base" --overwrite
    run references "${BOX[references]}" routing.log $PYTHON tests/benchmarks/bench_par_reference.py "$base" \
      --data "$DATA/train-00.jsonl.xz" --device "$DEVICE" $REFERENCES
  done
}

gpu_tests() { run tests "${BOX[tests]}" tests.log $PYTHON -m pytest tests/gpu -m gpu -p no:cacheprovider $TESTS; }

behind() { [[ ",$BACKGROUND," == *",$1,"* ]]; }

behind tests && gpu_tests > /dev/null &
behind recipes && recipes > /dev/null &
behind references && references > /dev/null &
wanted tests && ! behind tests && gpu_tests
wanted latency && latency $((BOX[latency] / 2)) model $LATENCY
wanted latency && latency $((BOX[latency] / 2)) ffn $FFN
wanted sweep && routing sweep 1 "$WORKERS"
wanted recipes && ! behind recipes && recipes
wanted references && ! behind references && references
wanted table && routing table 1 "$WORKERS"
wanted long && routing long 9 1
if wanted constants; then
  run constants "${BOX[constants]}" latency.log $PYTHON tests/benchmarks/bench_gpu_constants.py $CONSTANTS \
    --checkpoint "$WORK/routing/bases" --text "$DATA/valid.jsonl.xz" --device "$DEVICE" --out "$OUT/latency.md"
fi
if wanted compiled; then
  run compiled "${BOX[compiled]}" latency.log $PYTHON tests/benchmarks/bench_model_latency.py --device "$DEVICE" \
    --dtype bfloat16 --rounds 5 --top-k 1 $COMPILED
fi
wait
[ ! -e "$OUT/failed" ] && say done && exit
say "done, failed: $(sort -u "$OUT/failed" | xargs)"
rm "$OUT/failed"
exit 1
