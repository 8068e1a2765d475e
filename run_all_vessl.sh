#!/usr/bin/env bash
# From a fresh clone to a trained model and its report: environment -> data -> tokenizer -> tokens -> train -> report.
# A stage whose result is there does nothing, so run the script again after an interruption. It runs on any machine: it
# picks preset and corpus to suit the machine, and prints its choice.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: ./run_all_vessl.sh [options] [-- options of python -m yaongi.train]
  --preset NAME    a file of yaongi/presets/ without .toml; default: by the machine
  --source SPEC    embedded, hub, DOMAIN=PATH, a folder with train/, a file or folder, hf:OWNER/NAME[:SUBSET] or
                   DOMAIN=hf:OWNER/NAME[:SUBSET]; may be repeated; a domain may have any name
  --mix SHARES     shares of the domains, such as ko=40,law=20; default: those that have text
  --text-field F   field of the rows that holds the text
  --encoding E     encoding of local files, such as cp949; default: utf-8
  --tokens N       tokens to train on; default: the preset's, but at most 4 epochs of what is there
  --vocab-size N   pieces of the tokenizer; default: 32768, of yaongi-tiny 4096; fewer if the text is too little
  --gpus N         GPUs to train on, or processes without one; default: all GPUs of the machine
  --stage NAME     only this one: env, data, tokenizer, tokens, train, report; or one that only runs when asked for: eval,
                   scores of the model, with options of python -m yaongi.eval tasks after --; tune, the model tuned on
                   conversations and how many instructions it follows, with options of python -m yaongi.tune after --;
                   chat, all of these but eval, then a conversation, with options of python -m yaongi.chat after --
  --chat SPEC      conversations to tune on: a file, hf:OWNER/NAME or embedded:instructions, the default
  --smoke          everything in miniature, a minute or two
  --help
WANDB_API_KEY, HF_TOKEN and the like are read from .env if it is there. PYTHON picks the interpreter of a new environment.
TEXT
}

say() { printf '== %dm%02ds %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

preset="" stage=all smoke=0 vocabulary="" tokens="" gpus="" chat=""
sources=() extra=() mix=() field=() encoding=()
while (($#)); do
  case $1 in
    --preset | --source | --mix | --text-field | --encoding | --tokens | --vocab-size | --gpus | --stage | --chat)
      (($# > 1)) || die "$1 must have a value, got none" ;;&
    --preset) preset=$2 && shift 2 ;;
    --source) sources+=("$2") && shift 2 ;;
    --mix) mix=(--mix "$2") && shift 2 ;;
    --text-field) field=(--text-field "$2") && shift 2 ;;
    --encoding) encoding=(--encoding "$2") && shift 2 ;;
    --tokens) tokens=$2 && shift 2 ;;
    --vocab-size) vocabulary=$2 && shift 2 ;;
    --gpus) gpus=$2 && shift 2 ;;
    --stage) stage=$2 && shift 2 ;;
    --chat) chat=$2 && shift 2 ;;
    --smoke) smoke=1 && shift ;;
    --help | -h) usage && exit ;;
    --) shift && extra=("$@") && break ;;
    *) die "option must be one of those that --help lists, got $1" ;;
  esac
done
case $stage in
  all | env | data | tokenizer | tokens | train | report | eval | tune) ;;
  chat) talk=("${extra[@]}") extra=() ;;
  *) die "--stage must be one of env, data, tokenizer, tokens, train, report, eval, tune, chat, got $stage" ;;
esac
[[ -z $gpus || $gpus =~ ^[1-9][0-9]*$ ]] || die "--gpus must be a number from 1, got $gpus"
wants() { [[ $stage == all || $stage == chat || $stage == "$1" ]]; }

# Read KEY=value lines. Surrounding blanks, `export`, quotes and comments are allowed; nothing is evaluated or printed.
# What the environment has already, read-only names such as UID too, stays as it is.
read_dotenv() {
  local line key value
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'} line=${line#$'\xef\xbb\xbf'}
    [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*=[[:space:]]*(.*)$ ]] || continue
    key=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    [[ -v $key ]] && continue
    if [[ $value =~ ^\"([^\"]*)\" || $value =~ ^\'([^\']*)\' ]]; then
      value=${BASH_REMATCH[1]}
    else
      [[ $value == \#* ]] && value=""
      value=${value%%[[:space:]]#*}
      value=${value%"${value##*[![:space:]]}"}
    fi
    export "$key=$value"
  done <"$1"
}
[[ -f .env ]] && read_dotenv .env

# Run a command that the script's signals reach: bash would keep them until the command ends. It has a process group of
# its own, so a Ctrl-C of the terminal reaches it once, from here.
run() {
  local child status=0 name
  set -m
  "$@" &
  child=$!
  set +m
  for name in TERM INT USR1; do
    # shellcheck disable=SC2064
    trap "kill -$name $child 2>/dev/null || true" $name
  done
  while :; do
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  if ((status > 128)); then # of a wait that a signal cut short, or the command's own
    local own=0
    wait "$child" 2>/dev/null || own=$?
    ((own == 127)) || status=$own
  fi
  trap - TERM INT USR1
  return $status
}

# ---- the machine
gpu="" memory=0 # "name, compute capability, MiB" of the first GPU
if command -v nvidia-smi >/dev/null; then
  query=(--query-gpu=name,compute_cap,memory.total --format=csv,noheader,nounits)
  if gpu=$(nvidia-smi "${query[@]}" 2>/dev/null); then gpu=${gpu%%$'\n'*} memory=${gpu##*, }; else gpu=""; fi
fi
hopper() { [[ $gpu == *", 9.0,"* ]]; }
online() {
  [[ ${HF_HUB_OFFLINE:-0} != 1 ]] && "$python" - <<'PY' 2>/dev/null
import urllib.request
import os
hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=5)
PY
}

# ---- environment: .venv with pinned packages; an installed torch that can use the GPU is kept
python=.venv/bin/python
own_torch() { "${PYTHON:-python3}" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

cuda_from_wheels() { # nvcc to build _C.so; all wheels of one version, for ptxas rejects the PTX of a newer nvvm
  local folder=$PWD/build/cuda pinned=13.0.88
  if [[ ! -f $folder/installed ]]; then
    say "environment: no nvcc here, so CUDA $pinned comes from wheels"
    "${pip[@]}" --no-deps --upgrade --target "$folder" "nvidia-cuda-nvcc==$pinned" \
      "nvidia-cuda-crt==$pinned" "nvidia-nvvm==$pinned" "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cccl==13.0.*" || return 1
    touch "$folder/installed"
  fi
  export CUDACXX=$folder/nvidia/cu13/bin/nvcc LIBRARY_PATH=$folder/nvidia/cu13/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
  chmod +x "$folder"/nvidia/cu13/bin/* "$folder"/nvidia/cu13/nvvm/bin/*
}

environment() {
  local torch="torch==2.13.0" options=()
  [[ -n $gpu ]] && torch="torch==2.11.0" # brings Triton 3.6.0, which the kernels' configurations were tuned with
  own_torch && torch="" options=(--system-site-packages)
  [[ -x $python ]] || "${PYTHON:-python3}" -m venv "${options[@]}" .venv
  local wanted stamp=.venv/installed.txt
  wanted=$(echo "$torch" && cat requirements-dev.txt)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    say "environment: installing pinned packages into .venv"
    if { [[ -z $torch ]] || "${pip[@]}" "$torch"; } && "${pip[@]}" -r requirements-dev.txt; then
      echo "$wanted" >"$stamp"
    elif "$python" -c 'import torch, sentencepiece, tyro, rich, matplotlib, safetensors, tokenizers'; then
      say "environment: not everything could be installed; what training needs is there"
    else
      die "the packages of requirements-dev.txt can't be installed (see above)"
    fi
  fi
  local build=0
  if hopper; then
    build=auto
    if [[ -z ${CUDACXX:-} && ! -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] && ! command -v nvcc >/dev/null; then
      cuda_from_wheels || { say "environment: no CUDA wheels to be had; Triton kernels will do" && build=0; }
    fi
    command -v cmake >/dev/null || "${pip[@]}" cmake
  fi
  if [[ $build == auto || ! -x .venv/bin/yaongi ]]; then
    "${pip[@]}" "setuptools>=77" && YAONGI_CUDA=$build "${pip[@]}" --no-deps --no-build-isolation --editable . ||
      die "yaongi can't be installed (see above)"
  fi
  say "environment: $("$python" --version), torch $("$python" -c 'import torch; print(torch.__version__)'), ${gpu:-no GPU}"
}
pip=("$python" -m pip install --quiet --disable-pip-version-check)
wants env && environment
[[ $stage == env ]] && exit
[[ -x $python ]] || die "no environment yet: run ./run_all_vessl.sh --stage env"

# ---- preset and corpus
# The sources' ASCII letters, and a hash that keeps apart those that differ in others.
corpus_name() {
  [[ $# == 1 && $1 =~ ^(embedded|hub)$ ]] && echo "$1" && return
  local letters && letters=$(IFS=+ && LC_ALL=C tr -cs 'A-Za-z0-9+' '-' <<<"$*" | sed 's/^[-+]*//; s/-$//')
  echo "${letters:0:60}${letters:+-}$(printf '%s\0' "$@" | sha256sum | cut -c 1-12)"
}
why="as asked"
if ((smoke)); then
  preset=${preset:-yaongi-tiny}
  ((${#sources[@]})) || sources=(embedded)
elif [[ -z $preset ]]; then
  if [[ -z $gpu ]]; then
    preset=yaongi-tiny why="there is no GPU"
  elif hopper && ((memory > 75000)) && { ((${#sources[@]})) || online; }; then
    preset=yaongi-4b why="a Hopper GPU with $((memory / 1024)) GB"
  else
    preset=yaongi-small why="a GPU, but not an 80 GB Hopper with text to train a large model on"
  fi
fi
if ((!${#sources[@]})); then
  if [[ $preset != yaongi-tiny ]] && online; then sources=(hub); else sources=(embedded); fi
fi
if [[ ! -f yaongi/presets/$preset.toml ]]; then
  presets=$(cd yaongi/presets && echo *.toml)
  presets=${presets//.toml/}
  die "--preset must be one of ${presets// /, }, got $preset"
fi
say "preset $preset ($why), corpus: ${sources[*]}"

pieces=32768 megabytes=60
[[ $preset == yaongi-tiny ]] && pieces=4096 megabytes=8 # a head of 32,768 would take most of its time
name=$(corpus_name "${sources[@]}")
((smoke)) && name=smoke-$name
folder=data/$name out=runs/$preset-$name

# ---- stages
preset_tokens() { "$python" -c 'import sys; from yaongi.presets import read_preset; print(read_preset(sys.argv[1])["train"]["tokens"])' "$preset"; }
options=() named=()
wants data && say "data: ${sources[*]}"
for source in "${sources[@]}"; do
  case $source in
    hub)
      if wants data; then run "$python" -m yaongi.data download --tokens "${tokens:-$(preset_tokens)}" --out data/raw; fi
      options+=(--source data/raw)
      ;;
    hf:* | *=hf:*) named+=(--source "$source") ;;
    *) options+=(--source "$source") ;;
  esac
done
if ((${#named[@]})); then
  if wants data; then
    run "$python" -m yaongi.data download "${named[@]}" "${field[@]}" --tokens "${tokens:-$(preset_tokens)}" --out "$folder/raw"
  fi
  options+=(--source "$folder/raw")
fi
options+=("${field[@]}" "${encoding[@]}")
if wants data && [[ ! -f $folder/tokens/manifest.json ]]; then # tokens that are there keep the benchmarks they were made with
  if online; then
    run "$python" -m yaongi.data benchmarks --out "$folder/benchmarks"
  else
    say "benchmarks: NOT fetched, the hub can't be reached; texts that quote them are trained on"
  fi
fi
benchmarks=()
compgen -G "$folder/benchmarks/*.jsonl" >/dev/null && benchmarks=(--benchmark "$folder/benchmarks")
if wants tokenizer; then
  say "tokenizer"
  run "$python" -m yaongi.data tokenizer "${options[@]}" "${mix[@]}" --vocab-size "${vocabulary:-$pieces}" \
    --megabytes $megabytes --out "$folder/tokenizer"
fi
if wants tokens; then
  say "tokens"
  run "$python" -m yaongi.data tokenize "${options[@]}" "${benchmarks[@]}" --tokenizer "$folder/tokenizer" --out "$folder/tokens"
fi

# Train or tune in one process, or on several GPUs by torchrun, which starts all anew if one of them fails. A dry run
# comes before, so that a mistake is one line.
launch() {
  local module=yaongi.$1 count=$gpus
  shift
  [[ -n $count ]] || count=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
  if ((count == 1)); then
    run "$python" -m "$module" "$@"
    return
  fi
  run "$python" -m "$module" "$@" --dry-run --processes "$count" >/dev/null
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + count - 1) / count))}
  run "$python" -m torch.distributed.run --standalone --nproc-per-node "$count" --max-restarts 3 -m "$module" "$@"
}
if wants train; then
  say "train"
  training=("${mix[@]}")
  ((smoke)) && training+=(--tokens 80e3 --evaluate-rows 4 --sample-tokens 24)
  if [[ -n $tokens ]]; then
    training+=(--tokens "$tokens")
  elif [[ " ${extra[*]}" != *" --tokens"[\ =]* ]]; then
    training+=(--max-epochs 4)
  fi
  launch train --preset "$preset" --data "$folder/tokens" --out "$out" "${training[@]}" "${extra[@]}"
fi
if wants report; then
  say "report"
  "$python" -m yaongi.train.report "$out"
  say "done: text from the model with $PWD/$python -m yaongi.generate $PWD/$out/model --prompt '오늘은'"
fi
if [[ $stage == eval ]]; then
  say "eval"
  ((smoke)) && extra=(--limit 5 "${extra[@]}")
  run "$python" -m yaongi.eval tasks "$out" --out "$out/eval" "${extra[@]}"
fi
if [[ $stage == tune || $stage == chat ]]; then
  say "tune"
  tuning=(--base-data "$folder/tokens")
  if [[ $preset == yaongi-tiny ]]; then
    tuning+=(--row-tokens 512 --batch-tokens 2048 --lr-scale 0.3 --epochs 0.4 --mix chat=1)
  elif [[ -z $chat ]]; then # what docs/LAB.md measured with yaongi-small: 96.5 % of the answers are exact
    chat=embedded:instructions:400000
    tuning+=(--row-tokens 2048 --batch-tokens 32768 --lr-scale 0.6 --epochs 1)
  fi
  ((smoke)) && chat=embedded:instructions:200
  run "$python" -m yaongi.data chat --source "${chat:-embedded:instructions}" "${benchmarks[@]}" \
    --tokenizer "$folder/tokenizer" --out "$folder/chat"
  launch tune --init "$out/model" --data "$folder/chat" --out "$out-tuned" "${tuning[@]}" "${extra[@]}"
  run "$python" -m yaongi.eval tasks "$out-tuned/model" --suite instructions --limit 5 --out "$out-tuned/eval"
fi
if [[ $stage == chat ]]; then
  say "chat"
  exec "$python" -m yaongi.chat "$out-tuned/model" "${talk[@]}"
fi
