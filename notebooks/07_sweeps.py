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
# # Can a sweep be killed without anybody noticing?
#
# A sweep that takes a night is sooner or later stopped, by a time limit or by a lid that
# closes. Here a small one is killed in the middle and goes on. Its numbers are compared with
# those of a run that nobody disturbed. Then the same comparison is made with a model whose
# weights were rounded, to see that it would have shown a difference.

# %%
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
import yaml

import mechinterp as mi

temporary = TemporaryDirectory()
folder = Path(temporary.name)
command = str(Path(sys.executable).with_name("mechinterp"))

# %% [markdown]
# ## The spec
#
# Lists make a grid: here two ways to take a head out, times two draws of prompts. `split` cuts
# each call of the grid into items of work; an item is either done or not.

# %%
spec = {
    "name": "heads",
    "models": ["embedded"],
    "tasks": ["induction"],
    "prompts": [24],
    "seeds": [0, 1],
    "methods": [{"method": "head_ablation", "kinds": ["zero", "corrupted"]}],
    "split": {"prompts": 4},
}
(folder / "heads.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
print((folder / "heads.yaml").read_text())

# %% [markdown]
# ## Started, and killed
#
# The sweep runs in a process of its own, as on the command line, until a few items are done.
# Then comes `kill -9`, which no program can catch.

# %%
process = subprocess.Popen(
    [command, "run", str(folder / "heads.yaml"), "--out", str(folder / "killed"), "--quiet"]
)


def items_done():
    """How many files of numbers there are by now."""
    return len(list((folder / "killed").glob("**/*.parquet")))


while items_done() < 5 and process.poll() is None:
    time.sleep(0.01)
process.kill()
print("exit code", process.wait())
stopped = mi.open_run(folder / "killed")
stopped.status()

# %% [markdown]
# ## What can be read of it already
#
# Calls that are not complete have NaN where their prompts are missing.

# %%
stopped.results()

# %% [markdown]
# ## Resumed
#
# The same command, or the same call, does the rest. What is done is not done again: its files
# are as old as they were.

# %%
files = {path: path.stat().st_mtime_ns for path in stopped.files()}
resumed = mi.run(spec, folder / "killed", output="quiet")
print(resumed)
kept = sum(path.stat().st_mtime_ns == when for path, when in files.items())
print(f"{kept} of the {len(files)} items that were done are untouched")

# %% [markdown]
# ## Did anybody notice?
#
# The same sweep in another folder, left alone, and the two compared number by number.

# %%
whole = mi.run(spec, folder / "whole", output="quiet")


def diff(a, b):
    """What ``mechinterp diff`` prints."""
    told = subprocess.run(
        [command, "diff", str(folder / a), str(folder / b), "--rows", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    print(told.stdout, "exit code", told.returncode)


diff("killed", "whole")

# %% [markdown]
# ## Reading it
#
# One call of the grid gives the result that the method itself would have returned, with its
# picture; all of them are a table, a tree, or what SQL makes of them.

# %%
zero = resumed.results(kind="zero", seed=0).one()
zero.plot()
plt.show()
zero.top(3)

# %%
frame = resumed.to_frame(kind="zero")
ablated = frame[frame["variable"] == "ablated"]
ablated.groupby(["seed", "layer", "head"])["value"].mean().unstack("seed").nsmallest(4, 0)

# %%
print(resumed.to_xarray().groups)
resumed.sql(
    "SELECT kind, layer, head, round(avg(value), 2) AS metric FROM numbers "
    "WHERE variable = 'ablated' GROUP BY ALL ORDER BY metric LIMIT 6"
)

# %% [markdown]
# What takes a head's place decides what is asked. Zeros take away all that a head does; then
# 0.6 and 0.5 matter most. The corrupted run's output takes away only what differs between the
# runs; then 0.3 and 0.1 do, which notebook 01 found by patching.
#
# ## A larger grid
#
# A third draw of prompts, in the same folder: only what is new is run.

# %%
larger = mi.run(spec | {"seeds": [0, 1, 2]}, folder / "killed", output="quiet")
print(larger)
kept = sum(path.stat().st_mtime_ns == when for path, when in files.items())
print(f"{kept} of those {len(files)} items are still untouched")

# %% [markdown]
# ## Other weights
#
# The model with its weights rounded to bfloat16, under the same name. Its numbers go under keys
# of their own, since a key is made of the weights; `diff` puts them beside the others.

# %%
rounded = mi.load_model()
with torch.no_grad():
    for weights in rounded.parameters():
        weights.copy_(weights.bfloat16())
other = mi.run(spec, folder / "rounded", models={"embedded": rounded}, output="quiet")
diff("whole", "rounded")

# %%
ours, theirs = (
    run.results(kind="zero", seed=0).one().effect.mean("prompt") for run in (whole, other)
)
ax = plt.figure(figsize=(4, 4), layout="constrained").gca()
ax.scatter(ours, theirs, s=12)
ax.axline((0, 0), slope=1, color="grey", linewidth=0.5)
ax.set(xlabel="effect without a head (nats)", ylabel="the same, weights rounded")
plt.show()

# %% [markdown]
# Every number changed, and no conclusion did: with effects of up to nine nats, single prompts
# moved by 0.27 at most, and the means by head stay on the diagonal.
#
# ## To show it
#
# All calls in one file that needs no network.

# %%
report = mi.report(
    {str(each.item): each.result for each in resumed.results()}, folder / "heads.html"
)
print(f"{report.stat().st_size / 1e6:.1f} MB, {len(resumed.results())} results")

# %%
temporary.cleanup()

# %% [markdown]
# ## What would have changed the answer
#
# - A single number that differed between the killed run and the whole one. With another number
#   of threads after the kill some might, in the last digits: sums in another order round
#   otherwise.
# - An item that was half written. Files of numbers are complete or absent, and a file that the
#   ledger does not know is not used.
