#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has only this checkout, nvcc, CMake, Ninja and a python3 with torch and
# Triton: no network, nothing installed, no git.
#
#   OUT=<folder> benchmarks/on_gpu.sh [--minutes M] [--again] [--tiny] [--dry] all|PART|PART/STEP ...
#
#   build      native kernels      the library of csrc/, and whether this machine can run everything
#   test       native kernels      the tests that need a device; Triton's kernels, compiled instead of interpreted
#              suite slow          the rest of the tests, and the long sweeps of the kernels
#   bench      host loss parts ... rows of results: python -m benchmarks.run --help
#              probes              open questions, each with its prediction: python -m benchmarks.probes --help
#   sanitize   memcheck ...        compute-sanitizer over the CUDA kernels
#   train      demo camvid         trainings: the demo, and the CamVid study (python -m benchmarks.camvid --help)
#
# Every step takes under nine minutes. One that was finished with these sources is not repeated, and a failing one does
# not stop the rest: run the same command until it says that nothing is left. A table comes last. The exit status is 1
# if a step failed.
#
#   --minutes M   start nothing, and let nothing run on, after M minutes: 0.5 less than the machine grants a command
#   --again       repeat what was finished
#   --tiny        small cases; without a GPU the default
#   --dry         say what would be run
#
#   OUT           receives summary.txt, <device>.csv and logs.tar.gz
#   KEEP          logs, finished steps, checkpoints and compiled kernels stay here between commands (default: OUT);
#                 take build/on_gpu, which git ignores, where OUT is emptied before each command
#   PYTHON        python3 unless set
#   PEERS         folder with checkouts of the relatives (benchmarks/peers.py), CAMVID: folder with CamVid's frames
#   STUDY         more arguments of train/camvid, such as "--protocol long --arms components"
#   CONTEXTRAST_COMMIT   what to write into the results where there is no git
#
# The first half hour on a GPU, in commands of ten minutes:
#
#   1.  on_gpu.sh --minutes 9.5 build test/native test/kernels bench/loss     does it run, is it right, how fast
#   2.  on_gpu.sh --minutes 9.5 bench                                         beside everything else; probes are its last
#   3.  on_gpu.sh --minutes 9.5 all                                           what is left: sanitizer, suite, training
set -uo pipefail
cd "$(dirname "$0")/.."

# `all` and the parts run them in this order.
STEPS=(
  build/native build/doctor
  test/native test/kernels
  bench/host bench/loss bench/parts bench/edt bench/peers bench/compiled bench/step bench/scaling
  bench/probes
  sanitize/memcheck sanitize/racecheck sanitize/initcheck sanitize/synccheck
  test/suite test/slow
  train/demo train/camvid
)

die() { echo "on_gpu.sh: $1" >&2; exit 2; }

minutes="" again="" tiny="" dry="" wanted=()
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --minutes) [[ ${2-} =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--minutes: expected a number, got '${2-}'"; minutes=$2; shift ;;
    --again) again=1 ;;
    --tiny) tiny=1 ;;
    --dry) dry=1 ;;
    *)
      before=${#wanted[@]}
      for step in "${STEPS[@]}"; do [[ $1 == all || $1 == "$step" || $1 == "${step%/*}" ]] && wanted+=("$step"); done
      ((${#wanted[@]} > before)) || die "expected all, a part or a step (${STEPS[*]}), got '$1'" ;;
  esac
  shift
done
((${#wanted[@]})) || die "say what to run: all, build, test, bench, sanitize, train or a step; --help lists them"
[[ -n ${OUT-} ]] || die "set OUT to the folder that receives the results"

mkdir -p "$OUT" "${KEEP:=$OUT}" || die "cannot write to OUT ($OUT) or KEEP ($KEEP)"
OUT=$(cd "$OUT" && pwd) KEEP=$(cd "$KEEP" && pwd)
python=${PYTHON:-python3}
sources=$(find CMakeLists.txt csrc contextrast_kernels benchmarks tests -type f \
  \( -name '*.py' -o -name '*.c*' -o -name '*.h' -o -name '*.sh' -o -name '*.json' -o -name '*.txt' \) ! -name '*.csv' \
  -print0 | LC_ALL=C sort -z | xargs -0 cat | sha1sum | cut -c1-12)
gpu=""
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null && gpu=1
[[ -n $gpu ]] || tiny=1
[[ -n $tiny || " ${wanted[*]}" != *\ @(bench/|train/camvid)* || -n ${CONTEXTRAST_COMMIT-} ]] || git rev-parse HEAD > /dev/null 2>&1 ||
  die "set CONTEXTRAST_COMMIT to the commit of this checkout, which has no git: a row without one is not a result"
finished=$KEEP/finished/$sources${tiny:+-tiny}
results=$KEEP/results
mkdir -p "$finished" "$KEEP/logs" "$results"
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$KEEP/triton TORCHINDUCTOR_CACHE_DIR=$KEEP/inductor MPLCONFIGDIR=$KEEP/matplotlib
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHON=$python
command -v nvcc > /dev/null || PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

left() { # seconds of --minutes that are left, at most $1
  [[ -n $minutes ]] || { echo "$1"; return; }
  awk -v m="$minutes" -v s="$SECONDS" -v most="$1" 'BEGIN { t = int(60 * m - s); print t < most ? t : most }'
}

# What a step runs, as an array `command`, with the seconds it may take, or why it cannot be run here.
plan() {
  local bench=("$python" -m benchmarks.run --out "$results" --parts "${1#*/}" ${tiny:+--tiny})
  local pytest=("$python" -m pytest -rs) spread=() kernels=(tests/test_kernels*.py tests/test_*_kernel.py)
  # Compiling is most of the time of the kernels' tests.
  [[ -n $gpu ]] && "$python" -c 'import xdist' 2> /dev/null && spread=(-n 8)
  command=() limit=520 why=""
  case $1 in
    build/native)
      local options=(-DCONTEXTRAST_CUDA=ON -DCMAKE_CUDA_COMPILER="$(command -v nvcc)")
      if ! command -v nvcc > /dev/null; then
        [[ -z $gpu ]] || { why="nvcc was not found: put the CUDA toolkit's bin folder on PATH"; return; }
      fi
      [[ -z $tiny ]] || options=(-DCONTEXTRAST_CUDA=OFF)
      # The library is put into the package, where git ignores it; a small trial leaves the one that is there.
      command=(bash -ec 'cmake -S . -B "$0" -G Ninja "${@:2}" && cmake --build "$0"
        [[ -n $1 ]] || { cp "$0/_native.so" contextrast_kernels/_native.new && mv contextrast_kernels/_native.{new,so}; }'
        "$KEEP/native" "$tiny" "${options[@]}") ;;
    build/doctor) command=("$python" -m contextrast_kernels doctor) ;;
    test/native)
      [[ -n $gpu ]] || why="needs a GPU"
      command=("${pytest[@]}" -m gpu tests "${kernels[@]/#/--ignore=}") ;;
    test/kernels)
      command=("${pytest[@]}" "${spread[@]}" "${kernels[@]}")
      [[ -z $tiny ]] || command=("${pytest[@]}" tests/test_kernels.py -k test_backward_runs_what_forward_ran) ;;
    test/slow)
      [[ -z $tiny ]] || why="needs a GPU; make test-all runs the long sweeps without one"
      command=("${pytest[@]}" "${spread[@]}" -m slow "${kernels[@]}") ;;
    test/suite)
      command=("${pytest[@]}" "${spread[@]}" -m "not slow and not gpu" tests "${kernels[@]/#/--ignore=}")
      [[ -z $tiny ]] || command=("${pytest[@]}" tests/test_hashing.py) ;;
    bench/host) command=("$python" -m benchmarks.host --out "$results" ${tiny:+--rounds 1}) ;;
    bench/probes) command=("$python" -m benchmarks.probes --out "$results" ${tiny:+--tiny --only selection}) ;;
    bench/peers)
      [[ -n ${PEERS-} ]] || why="set PEERS to a folder with checkouts of the relatives: benchmarks/peers.py"
      command=("${bench[@]}" --peers "${PEERS-}") ;;
    bench/*) command=("${bench[@]}" ${tiny:+--cases camvid}) ;;
    sanitize/*)
      [[ -n $gpu ]] || why="needs a GPU"
      command=(benchmarks/sanitize.sh "${1#*/}") ;;
    train/demo) command=("$python" -m contextrast_kernels demo --out "$KEEP/demo" ${tiny:+--quick}) ;;
    train/camvid)
      [[ -n ${CAMVID-} ]] || why="set CAMVID to the folder with CamVid's frames"
      # Checkpoints are too large to hand over: they stay in KEEP. Unquoted: STUDY holds several arguments.
      command=("$python" -m benchmarks.camvid --root "${CAMVID-}" --out "$KEEP/camvid"
        ${tiny:+--protocol timing --arms baseline} ${STUDY-}) ;;
  esac
}

# Last lines of the table: what each step came to. Written again after every step, since a command can be killed.
table=()
hand_over() {
  {
    echo "sources $sources, $([[ -n $gpu ]] && echo "on a GPU" || echo "without a GPU")${tiny:+, small cases}"
    printf '%s\n' "${table[@]}"
  } > "$KEEP/summary.txt"
  [[ $KEEP == "$OUT" ]] || cp "$KEEP/summary.txt" "$OUT"
  cp "$results"/*.csv "$KEEP"/camvid/*.csv "$OUT" 2> /dev/null
  tar -C "$KEEP" -czf "$OUT/logs.tar.gz" $(cd "$KEEP" && ls -d logs demo 2> /dev/null)
}

failed=() unfinished=()
for step in "${wanted[@]}"; do
  plan "$step"
  log=$KEEP/logs/${step/\//-}.log seconds=0
  if [[ -n $dry ]]; then
    echo "$step  ${why:-${command[*]}}"
    continue
  elif [[ -n $why ]]; then
    state="not here: $why"
  elif [[ -e $finished/${step/\//-} && -z $again ]]; then
    state="finished before"
  elif (($(left "$limit") < 3)); then
    state="not reached" unfinished+=("$step")
  else
    time=$(left "$limit") start=$SECONDS
    [[ $step != @(bench/*|train/camvid) || $step == bench/host || $step == bench/probes ]] ||
      command+=(--minutes "$(awk -v s="$time" 'BEGIN { print (s > 40 ? s - 20 : s / 2) / 60 }')")
    echo "== $step"
    timeout -k 10 "$time" "${command[@]}" > "$log" 2>&1 < /dev/null
    code=$? seconds=$((SECONDS - start))
    if ((code == 124 || code == 137)); then
      state="stopped after $time s" unfinished+=("$step")
    elif ((code)); then
      state="FAILED ($code)" failed+=("$step")
      tail -n 25 "$log"
      ! tail -n 1 "$log" | grep -q 'rows left' || { state+=": $(tail -n 1 "$log")"; unfinished+=("$step"); }
    elif tail -n 1 "$log" | grep -q 'rows left'; then
      state=$(tail -n 1 "$log") unfinished+=("$step")
    else
      state="ok" && : > "$finished/${step/\//-}"
    fi
  fi
  table+=("$(printf '%-20s%5d s  %s' "$step" "$seconds" "$state")")
  hand_over
done
[[ -z $dry ]] || exit 0

echo
table+=("$(((${#unfinished[@]})) && echo "left: ${unfinished[*]}; run the same command again" || echo "nothing is left")")
((!${#failed[@]})) || table+=("failed: ${failed[*]}; logs are in $KEEP/logs")
hand_over
cat "$KEEP/summary.txt"
exit $((${#failed[@]} > 0))
