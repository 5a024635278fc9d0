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
# # Which heads copy from context?
#
# Give a language model random tokens, then their beginning again. It can only guess what comes
# next by finding the earlier occurrence and copying what followed it. Which attention heads do
# that, and how do we know that they are the cause and not a coincidence?
#
# Everything here runs on the model inside the package, in a minute on a laptop.

# %%
import random

import mechinterp as mi

model = mi.load_model()
task = mi.load_task("induction", model, n=32, seed=0)
task.show(n=2)

# %% [markdown]
# The corrupted prompt differs in one token: what followed the earlier occurrence. Does the
# model know the difference?

# %%
kept = task.filter(model)
print(f"{len(kept)} of {len(task)} prompts answered right")

# %% [markdown]
# ## Patch each head
#
# Run the corrupted prompt, and put one head's output from the clean run into it. If the answer
# comes back, that head carries it: `recovered` is 0 where nothing comes back and 1 where all
# does.

# %%
heads = mi.activation_patching(model, kept, "z", positions="all")
heads.plot()
heads.top(5)

# %% [markdown]
# ## Where does the information travel?
#
# The same for the residual stream, by role: the token that followed the earlier occurrence
# (`successor`), and the last position (`end`).

# %%
stream = mi.activation_patching(
    model, kept, "resid_pre", positions=["current", "successor", "end"]
)
stream.plot()

# %% [markdown]
# ## Is it the cause?
#
# Take the best three heads out, by putting their mean output in place of their own, and look at
# the loss on the second copy of random tokens; then take out three others, drawn at random, a
# few times. What would have changed our mind: a loss that rises just as much for the others, or
# not at all for these.

# %%
prompts = mi.repeated_tokens(model, n=32, length=32, seed=1)
text = mi.Text.from_tokens(model, prompts)
manager = mi.HookManager(model)
means = manager.mean(prompts, "z")


def second_copy_loss():
    """Mean loss in nats on the second copy."""
    return text.loss(model).isel(position=slice(-32, None)).mean().item()


def without(heads):
    """Take the heads out while a block runs."""
    return manager.edit(
        *(mi.edits.Mean("z", means, layers=layer, heads=head) for layer, head in heads)
    )


best = [(int(row["layer"]), int(row["head"])) for _, row in heads.top(3).iterrows()]
others = [(layer, head) for layer in range(4) for head in range(8) if (layer, head) not in best]
draw = random.Random(0)

print(f"all heads           {second_copy_loss():.2f} nats")
with without(best):
    print(f"without the best    {second_copy_loss():.2f} nats   {best}")
for _ in range(5):
    some = sorted(draw.sample(others, 3))
    with without(some):
        print(f"without others      {second_copy_loss():.2f} nats   {some}")

# %% [markdown]
# Layer 0 holds the heads that tell each token what came before it, layer 1 the induction heads
# that look for it. Random sets that contain one of the same circuit cost something, too: the
# embedded model keeps several copies of each kind.
