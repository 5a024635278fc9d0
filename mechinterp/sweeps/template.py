"""The spec that ``mechinterp init`` writes: every key, with what it means."""

TEMPLATE = """\
# A sweep for `mechinterp run THIS.yaml --out DIR`. Lists make a grid: every model, task,
# prompt count, seed and metric with every method. What is done is kept in DIR; the same
# command goes on where it stopped, and a larger grid runs only what is new.
# `mechinterp run THIS.yaml --out DIR --dry-run` says what it will cost.

name: first-sweep

# embedded, smollm2-135m, a hub name, ./a-folder or ./a.gguf; or with more to say:
#   - {source: ./my-model, dtype: bfloat16}     dtype: float32, float64, bfloat16, float16
#   - {source: org/name, revision: main, device_map: auto}
models: [embedded]

# Built-in tasks, ./mine.jsonl, or able: those that the model can do, as `mechinterp tasks`
# tells, at least least_accuracy of the time.
tasks: [able]
least_accuracy: 0.5
# texts: [./book.txt]        # running text, for ablation, pruning, head scores and the lens
# context: 256               # tokens of a piece of it

prompts: [32]                # how many of each task; leave out for all
seeds: [0]                   # which are drawn, and whatever else is
# metrics: [logit_diff]      # the task's own by default

methods:
  - method: head_ablation
    kinds: [zero, mean]      # zero, mean, position_mean, resample, corrupted

  - method: activation_patching
    sites: [z]               # z, resid_pre, attn_out, mlp_out, q, k, v, pattern, ...
    directions: [denoising]  # denoising, noising
    positions: all           # all, each, a role such as end, numbers, or a list of these
    # layers: [0, 1]
    # split: {prompts: 16}   # of this method alone

#  - method: attribution_patching
#    variants: [atp, ig]     # atp, atp*, ig, eap, eap-ig
#    sites: [z]
#  - method: mlp_ablation
#  - method: pruning_curve
#    rankings: [gradient, ablation]   # hard_concrete, redundancy, shapley, random
#    steps: 8
#  - method: head_scores     # on random tokens; on: data for the tasks and texts
#  - method: logit_lens
#    sites: [resid_post]

# How calls are cut into work items, each done or not done: two to ten seconds are a good
# length, and --dry-run says what these come to. Part of what a number is, so choose once.
split: {prompts: 32}         # layers: 2 cuts by layers, where a method sweeps them
memory: 1GB                  # what a call may take beside the model

# export: numbers.csv        # a table of everything, in DIR
"""
