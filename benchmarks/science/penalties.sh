#!/bin/sh
# The study of penalties from the data to its record: a fine-tuned decoder, its answers one to many, then every variant.
#   benchmarks/science/penalties.sh ../shared/data/dailydialog_valid.txt dailydialog dialogues smollm2-135m 24 24
#   benchmarks/science/penalties.sh ../shared/data/yelp_sentences_train.txt yelp yelp smollm2-135m 4 16
# DATA LAYOUT NAME DECODER MOST_PROMPT_TOKENS MOST_RESPONSE_TOKENS [options of benchmarks.science.penalties]
# PRECISION=fp32 where a CPU has no bf16 products.
set -e
data=$1 layout=$2 name=$3 decoder=$4 prompt=$5 response=$6
shift 6
parts=runs/penalties/$name
sft=runs/penalties/$name-sft
lengths="--max-prompt-len $prompt --max-len $response"
precision=${PRECISION:-bf16}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

case $layout in dailydialog | plato) turns="--turn-end <|im_end|>" ;; *) turns="" ;; esac
[ -e "$parts/rest.jsonl" ] ||
    python -m benchmarks.science.penalties "$data" --layout "$layout" $turns --decoder "$decoder" --prepare "$parts" $lengths
[ -e "$sft/model/config.json" ] ||
    python -m lmvae_fast.cli finetune --data "$parts/rest.jsonl" --decoder "$decoder" --output "$sft" $lengths \
        --max-steps 150 --batch-size 16 --lr 5e-5 --precision "$precision" --set train.grad_clip=1.0 --set train.warmup_steps=15 --seed 0
for part in train:16 test:32; do
    # goes on where it was stopped, and does nothing where all is there
    python -m lmvae_fast.cli generate "$sft/model" --prompts "$parts/${part%:*}.jsonl" --num-samples "${part#*:}" --sample \
        --top-p 0.95 --min-new-tokens 2 --seed 0 --output "$parts/${part%:*}-answers.jsonl"
done
python -m benchmarks.science.penalties "$parts" --decoder "$sft/model" --name "$name" --precision "$precision" $lengths "$@"
