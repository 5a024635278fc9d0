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
# # How many heads can go before the model forgets how to copy?
#
# First comes an atlas: which heads look at the same tokens, and read and write the same? Then
# heads are taken out, in several orders, and what is left is measured on data that did not rank
# them. In the end they are cut out of the weights, and the smaller model is checked against the
# masked one.

# %%
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch

import mechinterp as mi

model = mi.load_model()
text = mi.Text.from_tokens(
    model, mi.repeated_tokens(model, n=24, length=24, seed=0), name="repeated tokens"
)

# %% [markdown]
# ## The atlas
#
# Every pair of the 32 heads in several views, summed up as redundancy: 1 for heads that are
# identical in all of them, 0 for an average pair.

# %%
atlas = mi.redundancy_atlas(model, text, queries=256)
atlas.figure()
plt.show()

# %%
atlas.clusters(n=8)

# %% [markdown]
# Heads that are alike need not be interchangeable. So for the most similar pairs: does taking
# out both raise the loss by as much as taking out each does, added up? 0 says that they are
# worth the same apart and together. Above 0, each stands in for the other, since the metric is
# a loss.

# %%
closest = [
    tuple(
        (int(name.split(".")[0]), int(name.split(".")[1]))
        for name in (row["head_a"], row["head_b"])
    )
    for _, row in atlas.top(8).iterrows()
]
causal = mi.redundancy_atlas(model, text[:8], queries=64, pairs=closest, task=text[:8])
together = causal.interaction.mean("prompt")
for pair, value in zip(together["pair"].values, together.values, strict=True):
    print(f"{pair!s:12} {float(value):+.3f} nats")

# %% [markdown]
# Heads 0.5 and 0.6 are the most alike by far, and each stands in for the other. The heads of
# layer 2 are alike, too, and worth the same apart and together: next to nothing, as the next
# picture will say.
#
# ## What is left as heads go
#
# One half of the data ranks the heads, the other half measures what is left. The band of random
# orders is what a ranking has to beat.

# %%
curve = mi.pruning_curve(
    model, text, method=["gradient", "redundancy"], steps=8, rescore=False, draws=6
)
curve.plot()
plt.show()

# %%
can_go = curve.can_go(margin=0.25)
print(can_go)
print(curve.against_random())

# %% [markdown]
# Along the curve both orders beat all six random ones (with six, no smaller `p_draws` exists).
# In the order of the gradient, eight heads can go for less than 0.25 nats. In the order of the
# atlas already the first heads hurt: to be like another head is not to be unneeded.
#
# ## A smaller model
#
# Eight heads, the least important by gradient, are cut out of the weights. Their mean output
# goes into the output bias. The logits are those of the model with the heads masked.

# %%
heads = curve.removed("gradient", 8)
smaller = mi.prune_heads(model, heads, fold="mean", mean_data=text)
print(sorted(heads))
before, after = mi.cost(model), mi.cost(smaller)
print(
    f"attention parameters: {before.attention_parameters:,} to {after.attention_parameters:,}"
)
caches = before.cache_bytes_per_token, after.cache_bytes_per_token
print(f"cache per token: {caches[0]} to {caches[1]} bytes")

# %%
new = mi.Text.from_tokens(
    model, mi.repeated_tokens(model, n=16, length=24, seed=1), name="new repeated tokens"
)


def losses(model):
    """Mean loss in nats on the first and on the second copy."""
    loss = new.loss(model).mean("prompt")
    return float(loss[1:25].mean()), float(loss[25:].mean())


manager = mi.HookManager(model)
means = manager.mean(text, "z")
masked = [mi.edits.Mean("z", means, layers=layer, heads=head) for layer, head in heads]
with torch.no_grad(), manager.edit(*masked):
    expected = model(new.prompts.tokens)
with torch.no_grad():
    gap = (smaller(new.prompts.tokens) - expected).abs().max()
largest = float(expected.abs().max())
print(
    f"difference to the masked model: at most {float(gap):.1e}, of logits up to {largest:.0f}"
)
for name, one in (("whole", model), ("smaller", smaller)):
    first, second = losses(one)
    print(f"{name:8} first copy {first:.2f} nats, second copy {second:.2f} nats")

# %% [markdown]
# Saved and loaded, the model is still the same, and knows what its heads were called.

# %%
with TemporaryDirectory() as folder:
    mi.save_model(smaller, folder + "/smaller", card=curve)  # the card has the curve
    plt.close("all")
    again = mi.load_model(folder + "/smaller")
assert mi.fingerprint(again) == mi.fingerprint(smaller)
print(mi.pruning_of(again).heads)

# %% [markdown]
# ## What would have changed the answer
#
# - A band of random orders as good as the rankings: then the heads would be alike, and nothing
#   would have been learned by ranking them.
# - Other data. These heads can go as far as *copying random tokens* is concerned; prose may
#   need them. Rank on what the model is for.
# - A rise of the loss at the first head: then nothing would be redundant. Heads that are each
#   unimportant alone may be needed together; that is what the curve shows and a ranking hides.
