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
import mechinterp as mi

model = mi.load_model()
task = mi.load_task("induction", model, n=32, seed=0)
task.show(n=2)

# %% [markdown]
# Three roles name the places that matter, wherever they lie in a prompt: `end` is the last
# token, where the answer is read; `current` is its earlier occurrence; `successor` is the token
# after that, which is the answer. The corrupted prompt differs in that one token, `successor`,
# and so has another answer. Does the model know the difference?

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
# Two heads of layer 0 bring back the most, then several of layer 1. A head that does the same
# in both runs brings nothing back, however needed it is: this is the list of what carries the
# *difference*.
#
# ## Where does the information travel?
#
# The same for the residual stream entering each layer, one role at a time.

# %%
stream = mi.activation_patching(
    model, kept, "resid_pre", positions=["current", "successor", "end"]
)
stream.plot()

# %% [markdown]
# Entering layer 0, everything is at `successor`, the only token that differs; from layer 2 on
# everything is at `end`, where heads of layer 1 put it. `current` comes before the difference,
# so nothing can be there. And entering layer 1, none of the three has more than a trace: it is
# not lost, but at positions that no role names. Notebook 02 finds them.
#
# ## Is it the cause?
#
# Take the best three heads out of the clean run, together, by giving them what they have in the
# corrupted run; then three others of the same layers, drawn at random, a few times. What would
# change our mind: a logit difference that falls just as much for the others, or not at all for
# these.

# %%
best = [(int(row["layer"]), int(row["head"])) for _, row in heads.top(3).iterrows()]
sets = [best, *mi.random_heads(model, best, n=8)]
out = mi.head_ablation(model, kept, heads=sets, kind="corrupted")
print(f"clean {float(out.data['intact'].mean()):.2f} nats")
for some, left in zip(sets, out.data["ablated"].mean("prompt").values, strict=True):
    name = "without the best  " if some is best else "without others    "
    print(f"{name} {left:6.2f} nats   {sorted(some)}")

# %% [markdown]
# Without the three the model is as sure of the wrong token as it was of the right one; without
# three others of the same layers it still is right by nine nats and more. They are the cause of
# the difference.
#
# ## Are they all that copying needs?
#
# A harder cut: the same heads at their mean output, which takes away all that they say, not
# only what differs between two runs. Measured is the loss on the second copy of new random
# tokens.

# %%
prompts = mi.repeated_tokens(model, n=32, length=32, seed=1)
text = mi.Text.from_tokens(model, prompts)
manager = mi.HookManager(model)
means = manager.mean(prompts, "z")


def second_copy_loss():
    """Mean loss in nats on the second copy."""
    return text.loss(model).isel(position=slice(-32, None)).mean().item()


print(f"all heads           {second_copy_loss():.2f} nats")
for some in sets:
    name = "without the best  " if some is best else "without others    "
    gone = [mi.edits.Mean("z", means, layers=layer, heads=head) for layer, head in some]
    with manager.edit(*gone):
        print(f"{name}  {second_copy_loss():.2f} nats   {sorted(some)}")

# %% [markdown]
# No: now some of the other sets cost about as much. 0.0, 0.2 and 1.1 together change nothing
# above, and here as much as the best. Other heads of layer 0 say the same in both runs, so
# patching cannot show them, and copying needs them all the same. (Sets from any layer would
# have hidden that, which is why these are from the same ones.)
#
# So: heads 0.1 and 0.3 carry which token followed, those of layer 1 (1.2, 1.7 and more) bring
# it to the end, and they do so on top of what the rest of layer 0 provides. Which question was
# asked decides which heads are found.
