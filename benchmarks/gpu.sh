#!/usr/bin/env bash
# Run everything that needs a GPU within LIMIT seconds (default 480), the most useful parts first: do the trainers run, are
# their results right, how fast are they, how much memory do they take.
#     bash benchmarks/gpu.sh                     # full-size SVD with random weights: no downloads
#     SMALL=1 bash benchmarks/gpu.sh             # the embedded SVD: a rehearsal, also on a CPU
#     ONLY="checks lora_512" bash benchmarks/gpu.sh
# Parts of ONLY: checks lora_512 lora_1024 trainers kernels full boxes compile torchao. LIMIT=600 changes the time limit.
# Each result is printed as soon as it is known. JSON documents, tables, logs and steps.png go to benchmarks/results/<device>/.
# If OUT names a folder, they are also packed into $OUT/results.tgz.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v python >/dev/null || python() { python3 "$@"; } && export -f python 2>/dev/null || true
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TQDM_DISABLE=1
start_seconds=$SECONDS
device=$(python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '_') if torch.cuda.is_available() else 'CPU')")
results="benchmarks/results/$device${SMALL:+_small}"
runs=$(mktemp -d) # the output folders of the trainers
trap 'rm -rf "$runs"' EXIT
mkdir -p "$results/checks"
: >"$results/checks.txt"

elapsed() { echo $((SECONDS - start_seconds)); }
seconds_left() { echo $((${LIMIT:-480} - $(elapsed))); }
check_limit() { # seconds that one check may take, so that it leaves time for the others
    local left
    left=$(seconds_left)
    echo $((left < 150 ? left : 150))
}
wanted() { [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $1 "* ]]; }
headline() { echo "=== $* ($(elapsed) s)"; }
pack() { [ -z "${OUT:-}" ] || tar czf "$OUT/results.tgz" "$results"; }

check() { # check TITLE COMMANDS: run shell commands in the background; print one line that says whether they succeeded
    local title=$1 commands=$2
    local log="$results/checks/${title//[^a-zA-Z0-9]/_}.log"
    (
        check_start=$SECONDS
        if timeout "$(check_limit)" bash -c "set -eo pipefail; $commands" >"$log" 2>&1 </dev/null; then
            summary=$(grep -ohE 'memory: at most.*|PASS.*|largest.*' "$log" | tail -1)
            line="runs    $title, $((SECONDS - check_start)) s. $summary"
        else
            last_line=$(grep -vE '^\s*$|CalledProcessError|Traceback' "$log" | tail -1 | cut -c1-300)
            line="FAILS   $title: $last_line"
        fi
        echo "$line" | tee -a "$results/checks.txt"
    ) &
    jobs_started=$((${jobs_started:-0} + 1))
    [ $((jobs_started % ${JOBS:-$(nproc)})) -ne 0 ] || wait
}

measure() { # measure NAME COMMAND...: print what it prints but JSON, and keep it in NAME.txt; say so if it fails
    local name=$1 status
    shift
    if [ "$(seconds_left)" -le 20 ]; then
        echo "$name: not measured, because no time is left"
        return
    fi
    headline "$name"
    timeout "$(seconds_left)" "$@" 2>"$results/$name.err" | tee "$results/$name.txt" | grep -v '^{'
    status=${PIPESTATUS[0]}
    if [ "$status" -eq 124 ]; then
        echo "$name: stopped after $(elapsed) s, at the time limit. The end of $results/$name.err:"
        tail -5 "$results/$name.err"
    elif [ "$status" -ne 0 ]; then
        echo "$name: failed with exit status $status. The end of $results/$name.err:"
        tail -15 "$results/$name.err"
    fi
    pack
}

measure_step() { # measure_step NAME FLAGS...: run bench_step.py with these flags
    local name=$1
    shift
    measure "$name" python benchmarks/bench_step.py --output "$results/$name.json" "$@"
}

full_size() { # full_size METHOD WIDTHxHEIGHTxFRAMES: flags of bench_step.py for a full-size SVD in bf16
    local width height frames
    IFS=x read -r width height frames <<<"$2"
    echo "--model full --precision bf16 --rounds 3 --method $1 --width $width --height $height --num_frames $frames"
}

precisions="bf16 fp16"
if [ "$device" = CPU ]; then precisions=$(python -m svd_xtend.models.precision); fi
best=${precisions%% *}

if wanted checks; then
    headline "checks on the embedded SVD: $precisions"
    python -m svd_xtend.demo.synthetic_clips --base_folder data/demo >/dev/null
    python -m svd_xtend.demo.synthetic_clips --base_folder "$runs/roam" --domain roam --clips 12 >/dev/null
    tiny="--width=64 --height=48 --num_frames=8 --num_workers=2 --per_gpu_batch_size=2 --num_inference_steps=4 --decode_chunk_size=4"
    tiny+=" --validation_steps=2 --validation_clips=4 --validation_ratio=0.2 --checkpointing_steps=3 --seed=1"
    for precision in no $precisions; do
        check "parity with the stock pipeline, $precision" "python evaluate_svd.py --parity --mixed_precision=$precision --output_dir=$runs/parity_$precision"
    done
    for precision in $precisions; do
        check "full, EMA, resumed, $precision" "
            run() { python train_svd.py $tiny --use_ema --mixed_precision=$precision --output_dir=$runs/full_$precision \$@; }
            run --max_train_steps=3; run --max_train_steps=6
            python evaluate_svd.py --tuned $runs/full_$precision --num_clips=2 --num_inference_steps=4"
        check "LoRA, resumed, beside one never stopped, $precision" "
            run() { python train_svd_lora.py $tiny --mixed_precision=$precision \$@; }
            run --output_dir=$runs/lora_$precision --max_train_steps=3; run --output_dir=$runs/lora_$precision --max_train_steps=6
            run --output_dir=$runs/lora_again_$precision --max_train_steps=6
            python benchmarks/compare_weights.py $runs/lora_$precision $runs/lora_again_$precision
            python infer_svd.py --lora $runs/lora_$precision --image \$(ls data/demo/*/000.png | head -1) --num_inference_steps=4 --output_dir=$runs/infer_$precision"
        check "boxes, resumed, $precision" "
            run() { python train_svd_tracklet.py $tiny --base_folder=$runs/roam --mixed_precision=$precision --output_dir=$runs/boxes_$precision \$@; }
            run --max_train_steps=3; run --max_train_steps=6
            python infer_svd.py --tracklet_weights $runs/boxes_$precision --tracklets \$(ls $runs/roam/*/tracklets.json | head -1) --image \$(ls $runs/roam/*/000.png | head -1) --num_inference_steps=4 --output_dir=$runs/infer_boxes_$precision"
    done
    check "float32" "python train_svd.py $tiny --max_train_steps=3 --mixed_precision=no --output_dir=$runs/float32"
    check "no precision flag" "python train_svd_lora.py $tiny --max_train_steps=2 --output_dir=$runs/default 2>&1 | tee $runs/default.log; grep precision $runs/default.log"
    check "LoRA from a latent cache" "
        python cache_latents.py --base_folder=data/demo --width=64 --height=48 --mixed_precision=$best --latent_cache=$runs/cache
        python train_svd_lora.py $tiny --latent_cache=$runs/cache --mixed_precision=$best --max_train_steps=3 --output_dir=$runs/cached"
    check "automatic checkpointing" "python train_svd.py $tiny --max_train_steps=3 --gradient_checkpointing=auto --mixed_precision=$best --output_dir=$runs/auto"
    check "nested, offload" "python train_svd.py $tiny --max_train_steps=3 --gradient_checkpointing=nested --offload_activations --mixed_precision=$best --output_dir=$runs/nested"
    if [ "$best" = bf16 ]; then
        check "FSDP2, one process" "accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 1 train_svd.py $tiny --max_train_steps=3 --mixed_precision=bf16 --output_dir=$runs/fsdp2"
    fi
    if python -c "import torchao" 2>/dev/null; then
        check "adamw8bit" "python train_svd.py $tiny --max_train_steps=3 --optimizer=adamw8bit --train_params conv_in conv_out --mixed_precision=$best --output_dir=$runs/adamw8bit"
        if [ "$best" = bf16 ]; then
            check "adamw_bf16_sr, resumed" "
                run() { python train_svd.py $tiny --optimizer=adamw_bf16_sr --train_params conv_in conv_out --mixed_precision=bf16 --output_dir=$runs/adamw_bf16_sr \$@; }
                run --max_train_steps=3; run --max_train_steps=6"
        fi
    fi
    wait
    pack
fi

if [ -n "${SMALL:-}" ]; then
    wanted lora_512 && measure_step lora_64x48x8 --method lora --rounds 1
    wanted full && measure_step full_64x48x8 --method full --rounds 1 --only original ours
    wanted boxes && measure_step boxes_64x48x8 --method boxes --rounds 1 --only original ours
    wanted kernels && measure kernels python benchmarks/bench_kernels.py --small
else
    wanted lora_512 && measure_step lora_512x320x14 $(full_size lora 512x320x14)
    wanted lora_1024 && measure_step lora_1024x576x25 $(full_size lora 1024x576x25) --skip_loading
    if wanted trainers && [ "$(seconds_left)" -gt 60 ]; then
        headline "the trainers themselves on a full-size SVD of random weights"
        python benchmarks/full_size_weights.py "$runs/svd" 2>&1 | tail -1
        python -m svd_xtend.demo.synthetic_clips --base_folder "$runs/long" --domain roam --clips 4 --num_frames 30 >/dev/null
        large="--base_folder=$runs/long --source_fps=7 --pretrained_model_name_or_path=$runs/svd --max_train_steps=4 --num_workers=4 --seed=1 --num_inference_steps=2 --decode_chunk_size=4 --validation_steps=1000"
        JOBS=1
        check "LoRA 1024x576x25 bf16 nested" "python train_svd_lora.py $large --width=1024 --height=576 --num_frames=25 --mixed_precision=bf16 --gradient_checkpointing=nested --output_dir=$runs/a"
        wait
        check "full 512x320x25 bf16 auto" "python train_svd.py $large --width=512 --height=320 --num_frames=25 --mixed_precision=bf16 --gradient_checkpointing=auto --validation_steps=0 --checkpointing_steps=1000 --output_dir=$runs/b"
        wait
        rm -rf "$runs/b"
        pack
    fi
    wanted kernels && measure kernels python benchmarks/bench_kernels.py
    wanted full && measure_step full_512x320x25 $(full_size full 512x320x25) --skip_loading --only original "diffusers, its checkpointing" ours "ours, level0" "ours, blocks" "ours, nested"
    wanted boxes && measure_step boxes_512x320x14 $(full_size boxes 512x320x14) --skip_loading --only original ours "ours, blocks" "ours, nested"
    wanted compile && measure_step lora_512x320x14_compile $(full_size lora 512x320x14) --skip_loading --compile --only ours "ours, compile"
    wanted torchao && measure_step full_512x320x25_bf16 $(full_size full 512x320x25) --skip_loading --only "ours, adamw_bf16_sr"
fi
wait
if ls "$results"/*.json >/dev/null 2>&1; then
    python benchmarks/plot_steps.py "$results" >/dev/null && headline "look at $results/steps.png"
fi
echo "$(grep -c FAILS "$results/checks.txt") check(s) failed"
pack
