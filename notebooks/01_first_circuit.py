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
# Three roles name the places that matter, wherever they lie in a prompt. `end` is the last
# token, where the answer is read. `current` is the earlier occurrence of that token, and
# `successor` the token after it, which is the answer. The corrupted prompt has another token at
# `successor`, and so another answer. Does the model get the clean prompts right?

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
# Two heads of layer 0 bring back the most, then several of layer 1. This is the list of heads
# that carry the *difference*: one that does the same in both runs brings nothing back, however
# much it is needed.
#
# ## Where does the information travel?
#
# Now patch the residual stream as it enters each layer, one role at a time.

# %%
stream = mi.activation_patching(
    model, kept, "resid_pre", positions=["current", "successor", "end"]
)
stream.plot()

# %% [markdown]
# At the input of layer 0 everything is at `successor`, the only token that differs. From layer
# 2 on everything is at `end`, where heads of layer 1 put it. `current` comes before the
# difference, so nothing can be there. At the input of layer 1 none of the three has more than a
# trace: the information is not lost, but at positions that no role names. Notebook 02 finds
# them.
#
# ## Is it the cause?
#
# Take the best three heads out of the clean run, together, by giving them the output that they
# have in the corrupted run. Then do the same with three other heads of the same layers, drawn
# at random, a few times.

# %%
best = [(int(row["layer"]), int(row["head"])) for _, row in heads.top(3).iterrows()]
sets = [best, *mi.random_heads(model, best, n=8)]
out = mi.head_ablation(model, kept, heads=sets, kind="corrupted")
print(f"clean {float(out.data['intact'].mean()):.2f} nats")
for some, left in zip(sets, out.data["ablated"].mean("prompt").values, strict=True):
    name = "without the best  " if some is best else "without others    "
    print(f"{name} {left:6.2f} nats   {sorted(some)}")

# %% [markdown]
# Without these three the model is as sure of the wrong token as it was of the right one.
# Without three others of the same layers it is still right, by 8.8 nats or more. So these
# three cause the difference.
#
# ## Are they all that copying needs?
#
# A harder test gives the same heads their mean output. That takes away all that they say, not
# only what differs between the two runs. What it costs is the rise of the loss on the second
# copy of new random tokens.

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
# No: now some of the other sets cost about as much. Heads 0.0, 0.2 and 1.1 together changed
# nothing above, and cost as much as the best here. Other heads of layer 0 say the same in both
# runs, so patching cannot show them, and copying needs them all the same. (Sets drawn from all
# layers would have hidden that, which is why these come from the same layers.)
#
# The answer: heads 0.1 and 0.3 carry which token followed, and heads of layer 1 (1.2, 1.7 and
# more) bring it to the end, on top of what the rest of layer 0 provides. Which heads are found
# depends on which question was asked.
#
# ## What would have changed the answer
#
# - Had the logit difference fallen just as much without three random heads, or not at all
#   without the best three, these would not be the cause.
# - Had the mean ablation cost nothing for any other set, the three would be all that copying
#   needs.
# - Another corruption would have asked another question: patching shows only what carries the
#   difference between the two prompts.
