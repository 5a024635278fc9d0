# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does a patch say, and what does it not?
#
# Activation patching takes one activation from one run and puts it into another. The grid of
# numbers that comes out answers different questions, depending on which run gives and which
# takes, where the patch is, and what the two prompts differ in. Here the answers stand beside
# each other: first for a trained model, then for one whose circuit is known because its weights
# were written down.

# %%
import matplotlib.pyplot as plt

import mechinterp as mi

model = mi.load_model()
task = mi.load_task("induction", model, n=48, seed=0).filter(model)
task.show(n=1)
print(f"{len(task)} of 48 prompts answered right")

# %% [markdown]
# Only prompts that the model gets right are kept: patching explains a behaviour that is there.
#
# ## Two directions
#
# *Denoising* runs the corrupted prompt and puts in one head from the clean run: is the head
# enough? *Noising* runs the clean prompt and puts in one corrupted head: is it needed?

# %%
enough = mi.activation_patching(model, task, "z", positions="all")
needed = mi.activation_patching(model, task, "z", positions="all", direction="noising")
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
enough.plot(axes[0])
needed.plot(axes[1])
plt.show()

# %%
enough.top(6)[["layer", "head"]].assign(
    recovered=[
        float(enough.recovered.sel(layer=row.layer, head=row.head))
        for row in enough.top(6).itertuples()
    ],
    destroyed=[
        float(needed.destroyed.sel(layer=row.layer, head=row.head))
        for row in enough.top(6).itertuples()
    ],
)

# %% [markdown]
# The two directions nearly agree here. Each column adds up to well over 1, because heads of
# layer 0 feed those of layer 1 and the same difference passes through both. Shares of single
# heads are not parts of a whole.
#
# ## Where in the prompt, and in which part of a layer?
#
# By role: `current` is the token whose repetition ends the prompt, `successor` what followed it
# (the one token that differs between the runs), `end` the last position.

# %%
roles = ["current", "successor", "end"]
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for ax, site in zip(axes, ["resid_pre", "attn_out", "mlp_out"], strict=True):
    mi.activation_patching(model, task, site, positions=roles).plot(ax)
plt.show()

# %% [markdown]
# At the input of layer 0 everything is at `successor`, the one token that differs; from layer 2
# on everything is at `end`, where attention of layer 1 put it, and the MLPs carry it on.
# `current` is before the first difference: its cells are exactly 0 and cost nothing.
#
# But at the input of layer 1 no role has it. A sweep over roles does not see what lies
# elsewhere, so look at every position:

# %%
each = mi.activation_patching(model, task, "resid_pre", positions="each")
each.plot()
plt.show()

# %% [markdown]
# Between layers 0 and 1 the difference waits at two positions near the end of the first copy,
# where nobody would have put a role. Where the two heads of layer 0 look from there:

# %%
mi.attention_patterns(model, task, heads=[(0, 1), (0, 3), (1, 2), (1, 7)]).figure()
plt.show()

# %% [markdown]
# They look back at `successor`, and the heads of layer 1 look at *them* from the end. That is
# not the textbook picture, in which the last token looks at `successor` itself.
#
# ## How sure is that?
#
# A result keeps every value per prompt. Intervals are over prompts, and p-values are corrected
# for all heads. Whether a head does next to nothing is tested as well, against a margin of 5 %
# of the gap between the runs.

# %%
sure = enough.statistics()
strong = sure["p_adjusted"] < 0.05
negligible = sure["p_equivalent"] < 0.05
print(f"{int(strong.sum())} of {strong.size} heads have an effect")
print(f"{int(negligible.sum())} surely have next to none")
print(f"{int((strong & negligible).sum())} have an effect, and it is negligible")
needed_prompts = enough.prompts_needed(half_width=0.5)
print(f"for ± 0.5 nats everywhere: {int(needed_prompts.max())} prompts")

# %% [markdown]
# ## Trap 1: one of two is enough
#
# This known model has two heads that do the same. Denoising finds both. Noising one of them
# changes nothing, since the other is still there; noising both breaks everything.

# %%
known = mi.known_model("redundant_pair")
pair_task = known.task(16)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
one_in = mi.activation_patching(known.model, pair_task, "z", positions="all")
one_out = mi.activation_patching(
    known.model, pair_task, "z", positions="all", direction="noising"
)
one_in.plot(axes[0])
one_out.plot(axes[1])
plt.show()
print(known.circuit)

# %%
corrupted = mi.run_activations(known.model, pair_task, "corrupted", "z")
pair = known.circuit["previous_token"]
edits = [mi.edits.Replace("z", corrupted, layers=layer, heads=head) for layer, head in pair]
values = mi.cell_metrics(
    known.model, pair_task, [mi.Cell(edits[0]), mi.Cell(edits[1]), mi.Cell(edits)]
)
intact = float(one_out.data["clean"].mean())
for name, value in zip([*map(str, pair), "both"], values[..., 0].mean(1), strict=True):
    print(f"noised {name}: logit difference {float(value):.2f} (intact {intact:.2f})")

# %% [markdown]
# ## Trap 2: the metric
#
# A probability is squeezed between 0 and 1, so it sees little where the answer is out of reach
# or already sure. The same runs, measured twice:

# %%
twice = mi.activation_patching(
    model,
    task,
    "z",
    positions="all",
    metric={"logit_diff": "logit_diff", "prob": "prob"},
)
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
twice.plot(axes[0], metric="logit_diff")
twice.plot(axes[1], metric="prob")
plt.show()

# %% [markdown]
# ## What would have changed the answer
#
# - Had noising and denoising disagreed on the trained model as on the known one, sets of heads
#   would have to be patched together before any is called unimportant.
# - Had we swept roles alone, we would have said that the residual stream loses the answer
#   between layers 0 and 1. It was elsewhere.
# - With another corruption we would have asked another question: heads that do the same in both
#   runs (that say "a token was here before", for one) cannot show up in these pictures.
