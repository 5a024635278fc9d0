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
# # When does a model learn to copy, and with which heads?
#
# An induction head looks for an earlier occurrence of the current token and copies what
# followed it. The first part gathers the evidence on the embedded model's heads in one account.
# The second follows a training run whose checkpoints were kept: do the heads and the ability
# appear together?

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt

import mechinterp as mi

model = mi.load_model()

# %% [markdown]
# ## The dossier
#
# It says where heads look (prefix matching), what they do with what they see (copying), who
# feeds them (by weights, and by patching paths into their keys), and what the second copy loses
# without them, beside random sets of heads of the same layers.

# %%
dossier = mi.induction_dossier(model, k=4, n=20, n_sets=100, n_prompts=8)
print(dossier.summary())

# %%
dossier.figure()
plt.show()

# %% [markdown]
# The account is careful, and rightly so: seven of the eight heads of layer 1 match prefixes, so
# the random sets of that layer are made of such heads, too, and there are only 15 of them. What
# can be said is that the two candidates cost more than any other two.
#
# Here is one of them on one prompt. Queries of the second copy look along the first:

# %%
task = mi.load_task("induction", model, n=1, seed=3)
mi.attention_patterns(model, task, heads=[dossier.candidates[0]]).plot()
plt.show()

# %% [markdown]
# Do weights and interventions name the same partners? K-composition says whose output a head's
# keys *could* read; patched paths say whose they *do* read.
# `none` says that no path was sure on these prompts, not that there is none.

# %%
dossier.to_frame()[["head", "k_partner", "path_partner", "from_previous", "needed"]]

# %% [markdown]
# ## The phase change
#
# A 2-layer attention-only model, trained on made-up documents in which phrases repeat
# (`scripts/train_checkpoints.py`); twelve checkpoints were kept. Three measures of each: prefix
# matching of every head, the in-context score (loss late in a document minus loss early), and
# the loss.

# %%
here = Path.cwd()
root = next(p for p in (here, *here.parents) if (p / "scripts" / "results").is_dir())
folder = root / "scripts" / "results" / "checkpoints"
documents = json.loads((folder / "held_out.json").read_text())[:64]
last = mi.load_model(sorted(folder.glob("step-*"))[-1])
held_out = mi.Text.from_tokens(last, documents, name="held-out documents")
curve = mi.training_curve(folder, held_out, late=120, early=10, n_draws=8)
curve.figure()
plt.show()

# %%
curve.means().to_dataframe()

# %% [markdown]
# Prefix matching rises late and fast, and most of the in-context score and of the last fall of
# the loss come in the same steps. A part of the score, some 0.5 nats, is there before any head
# matches prefixes. But what happens at the same time need not be the cause. So take out the
# best head, and then all heads that match prefixes in the end, before the change and after it.

# %%
scores = curve.data["induction"].sel(step=1200)
matching = [
    (int(layer), int(head))
    for layer in scores["layer"]
    for head in scores["head"]
    if float(scores.sel(layer=layer, head=head)) > 0.5
]
for step in (200, 400, 1200):
    checkpoint = mi.load_model(folder / f"step-{step:05d}")
    whole = mi.icl_score(checkpoint, held_out, late=120, early=10).score
    manager = mi.HookManager(checkpoint)
    means = manager.mean(held_out, "z")
    print(f"step {step:4}: in-context score {whole:.2f} nats")
    for heads in ([curve.best], matching):
        edits = [mi.edits.Mean("z", means, layers=layer, heads=head) for layer, head in heads]
        with manager.edit(*edits):
            left = mi.icl_score(checkpoint, held_out, late=120, early=10).score
        print(f"           {left:.2f} without {heads}")

# %% [markdown]
# After the change, the whole score is gone without these heads, and hardly any of it without
# the best one alone.
#
# ## What would have changed the answer
#
# - Random sets of heads that cost as much as the candidates: then copying would not be theirs.
# - An in-context score that is complete before prefix matching rises: then something else would
#   have learned to use context. Here that something is the smaller part.
# - Had we stopped at the single best head, we would have said that induction hardly matters:
#   the others stand in for it. Sets have to be taken out.
