base_folder="data/fall" # <- your folder of videos (files or folders of frames); data/fall is drawn when it is first used
# LoRA fine-tuning. Installs what is missing, then trains:
#     bash train_svd_lora.sh                                                      the embedded SVD, on any machine
#     bash train_svd_lora.sh --pretrained_model_name_or_path=/path/to/weight      your SVD, 1024x576, 25 frames
# Further flags are passed on to train_svd_lora.py and override the values below.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/install.sh"
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then source "$here/.venv/bin/activate"; fi

precision=$(cd "$here" && python -m svd_xtend.models.precision) # the best that this machine supports

if [ "$base_folder" = "data/fall" ]; then # the default: draw the clips
    base_folder="$here/data/fall"
    (cd "$here" && python -m svd_xtend.demo.synthetic_clips --base_folder data/fall --domain fall --clips 48)
fi
if [[ " $* " == *" --pretrained_model_name_or_path"* ]]; then
    options=(
        --width=1024 --height=576 --num_frames=25 --gradient_checkpointing=auto
        --rank=16 --learning_rate=1e-4 --lr_warmup_steps=100 --max_train_steps=5000
        --checkpointing_steps=500 --checkpoints_total_limit=2 --validation_steps=500 --decode_chunk_size=4
        --output_dir=outputs/lora
    )
else
    cd "$here"
    python -m svd_xtend.demo.synthetic_clips --base_folder data/fall_held_out --domain fall --clips 16 --seed 7919
    options=(
        --width=64 --height=48 --num_frames=8 --num_workers=0 --per_gpu_batch_size=4 --vae_encode_chunk=32
        --rank=32 --lora_targets attention feed_forward projection conv --learning_rate=2e-3 --lr_scheduler=cosine
        --lr_warmup_steps=10 --max_train_steps=200 --checkpointing_steps=100 --checkpoints_total_limit=1
        --validation_steps=100 --num_inference_steps=10 --seed=123 --output_dir=outputs/lora_tiny
        --validation_folder data/fall_held_out --validation_image data/fall_held_out/fall000{0,1,2,3}/000.png
    )
fi
accelerate launch --num_cpu_threads_per_process "$(nproc)" "$here/train_svd_lora.py" \
    --base_folder="$base_folder" --mixed_precision="$precision" "${options[@]}" "$@"
