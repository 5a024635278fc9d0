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
# # When does the model know what comes next?
#
# A lens reads the residual stream after each layer as if the model ended there. It tells from
# which layer on the answer can be read. It does not tell when the answer is computed, nor
# whether the model uses what can be read. Three readings are compared here: the logit lens, a
# tuned lens, and direct logit attribution.

# %%
import matplotlib.pyplot as plt
import torch

import mechinterp as mi

model = mi.load_model()
task = mi.load_task("induction", model, n=32, seed=0).filter(model)

# %% [markdown]
# ## The logit lens
#
# The prompts are random tokens, then their beginning again, so the answer is the token that
# came next the first time. Here is its rank after each layer, where 0 is the first choice:

# %%
seen = mi.logit_lens(model, task)
seen.figure()
plt.show()

# %% [markdown]
# The next picture reads one prompt of running text, token by token. Each cell shows what the
# model would say next if it ended there.

# %%
text = mi.Text.from_strings(
    model, ["Once upon a time there was a king who had a little daughter, and she was"]
)
mi.logit_lens(model, text).plot(prompt=0)
plt.show()

# %% [markdown]
# ## Is the early layer silent, or does it speak another language?
#
# A tuned lens has a translator per layer, fitted to say what the model will say in the end. It
# needs text; here the model writes its own, one half to fit and one half to judge.

# %%
torch.manual_seed(0)
start = torch.zeros((64, 1), dtype=torch.long)  # the token that opens a text
written = model.generate(start, max_new_tokens=63, do_sample=True, verbose=False)
documents = mi.Text.from_tokens(model, written.tolist(), name="its own text")
lens = mi.TunedLens.fit(model, documents[:48], steps=150, tokens=512)
judged = lens.evaluate(model, documents[48:])
judged.plot()
plt.show()
judged.table()

# %%
tuned = mi.logit_lens(model, task, site="resid_pre", lens=lens)
plain = mi.logit_lens(model, task, site="resid_pre")
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plain.plot(axes[0])
tuned.plot(axes[1])
plt.show()

# %% [markdown]
# The tuned lens predicts running text better than the logit lens at every layer it was fitted
# for. Where the answer is copied both lenses read it from the same layer on, the input of layer
# 2: before, it is not there to be read, in any basis that the translator knows.
#
# ## Who writes the answer?
#
# The logit difference is a sum of what components wrote, with the last norm held at its scale.
# The bars add up to the model's own number.

# %%
shares = mi.direct_logit_attribution(model, task)
shares.waterfall(n=10)
plt.show()
shares.top(5)

# %% [markdown]
# ## Is what is read also used?
#
# Reading is not causing. So take every head out, one at a time, and compare what the logit
# difference loses with the head's share of it. Where less is lost, later layers made up for the
# head; where more is lost, other components needed what it wrote.

# %%
heads = shares.heads.mean("prompt")
removed = mi.head_ablation(model, task, kind="mean").effect.mean("prompt")
figure, ax = plt.subplots(figsize=(5, 4.5), layout="constrained")
for layer in heads["layer"].values:
    ax.scatter(heads.sel(layer=layer), -removed.sel(layer=layer), label=f"layer {layer}")
ax.axline((0, 0), slope=1, color="0.7", zorder=0)
ax.set_xlabel("direct share (nats of log-odds)")
ax.set_ylabel("lost without the head (nats of log-odds)")
ax.legend()
plt.show()

# %% [markdown]
# Heads on the line act on the logits directly. Those of layer 1 lie a little below it: part of
# what they wrote is made up for. Heads of layer 0 write nothing into the answer and are needed
# all the same: no lens at the end sees them.
#
# ## What would have changed the answer
#
# - Had the tuned lens read the answer a layer before the logit lens, we would say that the
#   model knows it earlier, in another basis.
# - Had all heads been on the line, reading would be enough, and patching unnecessary.
# - On prompts that the model gets wrong there would be no layer from which on the answer is
#   known; `task.filter` left them out.
