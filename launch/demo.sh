#!/usr/bin/env bash
# Trains a full pipeline and writes ranked pictures and a page. DALL-E: data, a VQ-VAE, a discrete
# VAE, a CLIP, a DALL-E; about a quarter of an hour on two CPU cores. DALL-E 2 (--pipeline=unclip):
# data, a CLIP, a prior, a decoder, an inpainter, an upsampler. After an interruption the same
# command continues.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/demo.sh [--pipeline=dalle|unclip] [--data=shapes|emoji] [--size=SIZE]
                           [--out=DIR] [--dry_run]

  --pipeline=NAME  dalle: DALL-E (default) · unclip: DALL-E 2
  --data=NAME      shapes: generated scenes (default) · emoji: real pictures (needs npm; dalle only)
  --size=SIZE      dalle only: size to train in configs/{vqvae,dvae,clip,dalle}.py
                   (default: demo for shapes, emoji_demo for emoji)
  --out=DIR        folder for all results (default: runs/demo, runs/demo-emoji, runs/demo-unclip)
  --dry_run        print the commands and do nothing

PYTHON=python3.13 bash launch/demo.sh   selects the Python.
TEXT
}

refuse() {
  echo "error: $*" >&2
  usage >&2
  exit 2
}

pipeline=dalle data=shapes size="" out="" dry_run=""
for argument in "$@"; do
  case $argument in
    --pipeline=dalle | --pipeline=unclip) pipeline=${argument#*=} ;;
    --data=shapes | --data=emoji) data=${argument#*=} ;;
    --size=?*) size=${argument#*=} ;;
    --out=?*) out=${argument#*=} ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    *) refuse "$argument is not understood" ;;
  esac
done
if [[ $pipeline == unclip ]]; then
  [[ $data == shapes ]] || refuse "--data=$data: the demo of DALL-E 2 samples shapes"
  [[ ! $size ]] || refuse "--size=$size: the demo of DALL-E 2 has one size"
  size=demo out=${out:-runs/demo-unclip}
elif [[ $data == emoji ]]; then
  size=${size:-emoji_demo} out=${out:-runs/demo-emoji}
else
  size=${size:-demo} out=${out:-runs/demo}
fi
logs=$out/logs sets=$out/data

# shellcheck source=launch/steps.sh
source launch/steps.sh
if [[ ! $dry_run ]]; then
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
  setup_python ""
  mkdir -p "$logs"
  if command -v flock >/dev/null; then # the steps hold it too, if this script is killed
    exec 9>"$out/.lock"
    flock -n 9 || {
      echo "error: another demo is at work in $out, or a step of a killed one:" >&2
      echo "wait for it, or look for it with: ps x | grep $out" >&2
      exit 1
    }
  fi
fi

train() { # NAME CORE CONFIG [FLAG…]: trains a stage with configs/CONFIG.py
  local name=$1 core=$2 config=$3
  shift 3
  start "$name" "$core" train "--config=configs/$config.py:size=$size" "--workdir=$out/$name" \
    "--config.data.data_dir=$sets" "$@"
}

# renew NAME…: repeats these steps if a network has just been trained.
renew() {
  local name
  ((ran == 0)) || for name in "$@"; do rm -f "$logs/$name.done"; done
}

dalle() {
  # ---- Data --------------------------------------------------------------------------------------
  # As many scenes as training reads. Every other scene has one object, which a quarter of an hour
  # is enough to learn.
  local scenes=() stages candidates=32 prompt
  [[ $data$size == shapesdemo ]] &&
    scenes=(--num_train=20000 "--kinds=single,count,single,binding,single,relation")
  start prepare any prepare "$data" --data_dir="$sets" --image_px=32 --workers=2 \
    ${scenes[@]+"${scenes[@]}"}
  finish prepare

  # ---- The codec ---------------------------------------------------------------------------------
  train vqvae both vqvae
  finish vqvae
  train dvae both dvae "--config.init_from=$out/vqvae"
  finish dvae

  # ---- DALL-E on its codes, CLIP in parallel -----------------------------------------------------
  train clip 1 clip
  train dalle 0 dalle "--config.stages.dvae=$out/dvae"
  finish dalle
  finish clip

  # ---- Evaluation and samples --------------------------------------------------------------------
  renew evaluate samples completion report
  stages=("--workdir=$out/dalle" "--clip=$out/clip")
  if [[ $data == shapes ]]; then
    # Accuracy on single objects without reranking, 120 prompts x 2 pictures: .45 (two seeds: .425,
    # .479); at guidance 3 .31, at guidance 1.5 .40. (With 16 and 24 prompts the same model scored
    # .23 and .43.)
    stages+=("--guidance=2" "--top_p=0.8" "--temperature=0.9")
    # 16 prompts per skill, as many held-out ones, 8 candidates each: about a minute on one core.
    start evaluate 1 evaluate --suite=shapes "${stages[@]}" --prompts_per_skill=16 --candidates=8 \
      --out="$out/evaluation"
  else
    stages+=("--guidance=2" "--top_p=0.8" "--temperature=0.9") # as for README's pictures
    # CLIP knows words that DALL-E seldom samples after an hour of training: the best 8 of 512
    # candidates are far better than the best 8 of 32.
    [[ $size == emoji ]] && candidates=512
    start evaluate 1 evaluate --suite=retrieval --clip="$out/clip" --split=held_out \
      --out="$out/evaluation"
  fi
  start samples 0 sample "${stages[@]}" --prompts_file="launch/prompts/$data.txt" \
    --candidates="$candidates" --keep=8 --out="$out/samples"
  finish samples
  # Completes the best picture of the first prompt; the folder's name is the prompt.
  prompt=$(head -n 1 "launch/prompts/$data.txt")
  start completion 0 sample "${stages[@]}" --prompt="$prompt" \
    --image="$out/samples/${prompt// /-}/01.png" --candidates=8 --keep=8 --out="$out/completion"
  finish completion
  finish evaluate
}

unclip() {
  # ---- Data: small pictures, and larger ones for the upsampler -----------------------------------
  local kinds="--kinds=single,count,single,binding,single,relation" stages
  start prepare 0 prepare shapes --data_dir="$sets" --image_px=32 --num_train=20000 "$kinds"
  start prepare64 1 prepare shapes --data_dir="$sets" --image_px=64 --num_train=6000 "$kinds"
  finish prepare
  train clip 0 clip
  finish prepare64

  # ---- The upsampler needs no CLIP ---------------------------------------------------------------
  train upsampler 1 upsampler
  finish clip
  finish upsampler

  # ---- The decoder; then the inpainter, which continues from it, in parallel with the prior ------
  train decoder both decoder "--config.stages.clip=$out/clip"
  finish decoder
  train prior 1 prior_diffusion "--config.stages.clip=$out/clip"
  train inpainter 0 decoder "--config.stages.clip=$out/clip" "--config.init_from=$out/decoder" \
    --config.loss.inpaint=true --config.train.steps=150 --config.optim.lr=3e-4 \
    --config.optim.warmup_steps=20 --config.optim.ema_decay=0.99 \
    --config.train.eval_every_steps=0 --config.train.preview_every_steps=0 \
    --config.train.eval_batches=1
  finish prior

  # ---- Evaluation and samples --------------------------------------------------------------------
  renew evaluate samples variations interpolation edited inpainted report
  stages=("--clip=$out/clip" "--decoder=$out/decoder")
  # Every path from caption to picture, 8 prompts per skill and as many held-out ones.
  start evaluate 1 evaluate --suite=shapes --pipeline=unclip "${stages[@]}" \
    --prior_diffusion="$out/prior" --prompts_per_skill=8 --candidates=1 --sampler=dpmpp \
    --steps=logsnr12 --out="$out/evaluation"
  finish inpainter
  stages+=("--upsampler=$out/upsampler" --steps=25)
  start samples 0 sample --pipeline=unclip "${stages[@]}" --prior_diffusion="$out/prior" \
    --prompts_file=launch/prompts/shapes.txt --candidates=8 --keep=4 --guidance=2 --out="$out/samples"
  finish samples
  start variations 0 vary "${stages[@]}" --image=launch/pictures/red-cube.png \
    --image=launch/pictures/two-shapes.png --n=8 --out="$out/variations"
  finish variations
  start interpolation 0 interpolate "${stages[@]}" --image=launch/pictures/red-cube.png \
    --image=launch/pictures/blue-star.png --num=8 --out="$out/interpolation"
  finish evaluate
  start edited 1 edit "${stages[@]}" --image=launch/pictures/red-cube.png \
    --from="a red cube on a white background" --to="a blue cube on a white background" \
    --guidance=3 --out="$out/edited"
  finish interpolation
  start inpainted 0 inpaint "${stages[@]}" --prior_diffusion="$out/prior" \
    --inpainter="$out/inpainter" --image=launch/pictures/red-cube.png --rect=34,0,30,64 \
    --prompt="a red cube to the left of a green star on a white background" --candidates=8 \
    --keep=4 --out="$out/inpainted"
  finish edited
  finish inpainted
}

"$pipeline"
renew report
start report any report --demo="$out"
finish report

if [[ $dry_run ]]; then
  exit
elif ((ran == 0)); then
  echo "nothing left to do: $out is finished (rm -r $out starts over)"
else
  log "finished"
fi
cat <<TEXT

  the page       $out/index.html
  the numbers    $out/metrics.json

Next:
TEXT
prompt=$(tail -n 1 "launch/prompts/$data.txt")
if [[ $pipeline == unclip ]]; then
  cat <<TEXT
  $python -m dalle_jax vary --clip=$out/clip --decoder=$out/decoder --upsampler=$out/upsampler \\
      --image=YOUR_PICTURE.png --out=$out/mine
TEXT
else
  cat <<TEXT
  $python -m dalle_jax sample --workdir=$out/dalle --clip=$out/clip --candidates=32 --keep=8 \\
      --prompt="$prompt" --out=$out/mine
  $python -m dalle_jax train --config=configs/dalle.py:size=$data --config.stages.dvae=$out/dvae \\
      --config.data.data_dir=$sets --workdir=runs/$data-dalle        # hours instead of minutes
TEXT
fi
