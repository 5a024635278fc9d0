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
# Activation patching takes one activation from one run and puts it into another. The same grid
# of numbers answers different questions, depending on which run gives and which takes, where
# the patch is, and what the two prompts differ in. Here the answers are put beside each other,
# on a trained model, and then on one whose circuit is known because its weights were written
# down.

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
both = enough.top(6)[["layer", "head"]].assign(
    recovered=[
        float(enough.recovered.sel(layer=row.layer, head=row.head))
        for row in enough.top(6).itertuples()
    ],
    destroyed=[
        float(needed.destroyed.sel(layer=row.layer, head=row.head))
        for row in enough.top(6).itertuples()
    ],
)
both

# %% [markdown]
# Neither column adds up to 1, and they do not agree: the shares of what single heads restore or
# break are not parts of a whole.
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
# The residual stream says *when* the information moves: it leaves `successor` and arrives at
# `end`. What attention and MLPs add says *who* moved it. `current` is before the first
# difference, so its cells are exactly 0 and cost nothing.
#
# ## How sure is that?
#
# Every value per prompt is kept. Intervals are over prompts, p-values are corrected for all
# heads; that a head does nothing is tested, too, against a margin of 5 % of the gap.

# %%
sure = enough.statistics()
strong = sure["p_adjusted"] < 0.05
negligible = sure["p_equivalent"] < 0.05
print(f"{int(strong.sum())} of {strong.size} heads have an effect")
print(f"{int(negligible.sum())} surely have next to none")
print(f"{int((strong & negligible).sum())} have an effect, and it is negligible")
needed_prompts = enough.prompts_needed(half_width=0.1)
print(f"for ± 0.1 nats everywhere: {int(needed_prompts.max())} prompts")

# %% [markdown]
# ## Trap 1: one of two is enough
#
# A known model with two heads that do the same. Denoising finds both. Noising one of them
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
# - Had noising and denoising agreed, head by head, one head would do the work at each step. They
#   do not, so sets of heads have to be tested together, as for the pair above.
# - Had the patch at `successor` still worked at the last layers, the information would not
#   have been moved by attention before them.
# - With another corruption we would have asked another question: heads that do the same in both
#   runs (those that only say "a token was here before") cannot show up in any of these pictures.
