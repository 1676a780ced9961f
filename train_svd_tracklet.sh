base_folder="data/roam" # <- your folder of videos (files or folders of frames) with boxes; data/roam is drawn when it is first used
# Box control, in three stages. Installs what is missing, then trains:
#     bash train_svd_tracklet.sh                                      the embedded SVD on moving shapes, on any machine
#     bash train_svd_tracklet.sh --pretrained_model_name_or_path=/path/to/weight --tracklets=/path/to/annotations
# Further flags are passed on to train_svd_tracklet.py in each stage and override the values below.
# --output_dir=FOLDER: the folder that gets the folders stage1, stage2 and stage3.
# For the embedded SVD: STEPS="100 100 60", the steps of the stages; CLIPS=16, the validation clips at the end.
set -euo pipefail
out=""
flags=()
for flag in "$@"; do
    case "$flag" in
        --output_dir=*) out="${flag#*=}" ;;
        --output_dir | --stage* | --tracklet_weights*)
            echo "$flag: this script sets it in each stage. Write --output_dir=FOLDER as one word, or launch train_svd_tracklet.py for a single stage." >&2
            exit 2 ;;
        *) flags+=("$flag") ;;
    esac
done
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/install.sh"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then source "$here/.venv/bin/activate"; fi
precision=$(cd "$here" && python -m svd_xtend.models.precision) # the best that this machine supports

if [[ "$base_folder" = "data/roam" && " $* " != *" --base_folder"* ]]; then # the default: draw the clips
    base_folder="$here/data/roam"
    (cd "$here" && python -m svd_xtend.demo.synthetic_clips --base_folder data/roam --domain roam --clips 600)
fi
if [[ " $* " == *" --pretrained_model_name_or_path"* ]]; then
    out="${out:-outputs/tracklet}"
    tiny=""
    options=(--width=512 --height=320 --gradient_checkpointing=auto --checkpointing_steps=1000 --checkpoints_total_limit=2
        --validation_steps=1000 --decode_chunk_size=4)
    stages=("" "" "") # the defaults of --stage: 50000, 50000 and 10000 steps
else
    cd "$here"
    out="${out:-outputs/tracklet_tiny}"
    tiny=yes
    python -m svd_xtend.demo.synthetic_clips --base_folder data/roam_held_out --domain roam --clips 4 --seed 7919
    options=(
        --width=64 --height=48 --num_frames=8 --num_workers=1 --per_gpu_batch_size=8 --vae_encode_chunk=8
        --P_mean=2 --lr_warmup_steps=10 --checkpointing_steps=100 --checkpoints_total_limit=1 --validation_steps=1000
        --num_inference_steps=10 --validation_image data/roam_held_out/roam000{0,1,2,3}/000.png
    )
    read -r first second third <<<"${STEPS:-100 100 60}"
    stages=(
        "--seed=1 --max_train_steps=$first --learning_rate=2e-3"
        "--seed=2 --max_train_steps=$second --learning_rate=1e-3"
        "--seed=3 --max_train_steps=$third --learning_rate=1e-3"
    )
fi
for stage in 1 2 3; do
    previous=()
    if [ $stage -gt 1 ]; then previous=(--tracklet_weights="$out/stage$((stage - 1))"); fi
    # shellcheck disable=SC2086  # the flags of a stage are separate words
    accelerate launch --num_cpu_threads_per_process "$(nproc)" "$here/train_svd_tracklet.py" --stage=$stage \
        --base_folder="$base_folder" --mixed_precision="$precision" "${options[@]}" ${stages[stage - 1]} \
        ${previous[@]+"${previous[@]}"} --output_dir="$out/stage$stage" ${flags[@]+"${flags[@]}"}
done
if [ $tiny ]; then
    python -m svd_xtend.demo.tiny_svd --evaluate svd_xtend/demo/weights/svd --tracklet_weights "$out/stage3" --clips "${CLIPS:-16}" \
        --picture "$out/control"
    echo "look at $out/control.gif and .png: the given boxes, without boxes, with boxes"
fi
