#!/usr/bin/env bash
# The whole matrix on one GPU, within 8 minutes: does every lever run, what does it cost, what does it save. Writes
# benchmarks/results/<name>/: a JSON document and a table of each measurement, steps.png, checks.txt.
#     bash benchmarks/gpu.sh                  # full-size SVD with random weights: no downloads
#     SMALL=1 bash benchmarks/gpu.sh          # the embedded SVD: a rehearsal, also on a CPU
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$SECONDS
name=$(python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_') if torch.cuda.is_available() else 'CPU')")
out="benchmarks/results/$name${SMALL:+_small}"
mkdir -p "$out"

left() { echo $((${LIMIT:-480} - (SECONDS - began))); } # seconds

check() { # what it is, flags: three steps of the embedded SVD
    local title=$1
    shift
    if timeout "$(left)" python train_svd.py --width=64 --height=48 --num_workers=0 --max_train_steps=3 --validation_steps=0 \
        --resume_from_checkpoint=none --checkpointing_steps=1000 --output_dir="$(mktemp -d)" "$@" >"$out/check.log" 2>&1; then
        echo "runs    $title: $(grep -o 'memory: at most.*' "$out/check.log")" | tee -a "$out/checks.txt"
    else
        echo "FAILS   $title: $(tail -1 "$out/check.log")" | tee -a "$out/checks.txt"
    fi
}

measure() { # file, flags of bench_step.py
    local file=$1
    shift
    [ "$(left)" -gt 20 ] || { echo "no time left for $file"; return; }
    timeout "$(left)" python benchmarks/bench_step.py "$@" 2>"$out/$file.err" | tee "$out/$file.txt" | grep -v '^{'
    tail -1 "$out/$file.txt" | grep '^{' >"$out/$file.json" || { rm "$out/$file.json"; tail -2 "$out/$file.err"; }
}

: >"$out/checks.txt"
check "float32" --mixed_precision=no
[ "$name" = CPU ] || check "fp16" --mixed_precision=fp16
check "auto checkpointing" --gradient_checkpointing=auto
[ "$name" = CPU ] || check "nested, offload, bf16" --gradient_checkpointing=nested --offload_activations --mixed_precision=bf16
if python -c "import torchao" 2>/dev/null; then check "adamw_bf16_sr" --optimizer=adamw_bf16_sr --mixed_precision=bf16 --train_params conv_in; fi

if [ -n "${SMALL:-}" ]; then
    measure lora_64x48x8 --method lora --rounds 1
    measure full_64x48x8 --method full --rounds 1
else
    measure lora_512x320x14 --model full --method lora --precision bf16 --width 512 --height 320 --num_frames 14 --rounds 3
    measure lora_1024x576x25 --model full --method lora --precision bf16 --width 1024 --height 576 --num_frames 25 --rounds 3
    measure full_512x320x25 --model full --method full --precision bf16 --width 512 --height 320 --num_frames 25 --rounds 3
    measure lora_512x320x14_compile --model full --method lora --precision bf16 --width 512 --height 320 --num_frames 14 --rounds 3 --compile --only ours "ours, compile"
    measure lora_1024x576x25_compile --model full --method lora --precision bf16 --width 1024 --height 576 --num_frames 25 --rounds 3 --compile --only "ours, blocks" "ours, blocks, compile"
fi
python benchmarks/plot_steps.py "$out"
echo "$((SECONDS - began)) s; look at $out/steps.png"
