"""Stored activations come back equal, are read lazily, and refuse files that are not theirs."""

import pytest
import torch
import zoo
from safetensors.torch import save_file

import mechinterp as mi
from mechinterp.hooks import HookManager


@pytest.fixture
def acts():
    model = zoo.zoo("llama")
    rows = [r[: 4 + i].tolist() for i, r in enumerate(zoo.tokens(3))]
    metric = lambda logits, _: logits[:, 0]  # noqa: E731
    return HookManager(model).capture(
        rows,
        ["embed", "z", "k", "pattern"],
        gradient_of=metric,
        heads=[0, 1],
        positions=[0, -1],
    )


def test_saving_and_loading_gives_the_same_and_reads_lazily(acts, tmp_path):
    acts.save(tmp_path / "acts.safetensors")
    loaded = mi.Activations.load(tmp_path / "acts.safetensors")
    assert list(loaded) == list(acts)
    for key in acts:
        assert torch.equal(loaded[key], acts[key])
        assert torch.equal(loaded.gradients[key], acts.gradients[key])
    assert torch.equal(loaded.index, acts.index)
    assert (loaded.lengths, loaded.heads, loaded.info) == (acts.lengths, acts.heads, acts.info)
    assert loaded.nbytes == acts.nbytes
    (tmp_path / "acts.safetensors").unlink()
    with pytest.raises((FileNotFoundError, OSError)):  # nothing was held in memory
        loaded["z", 0]


def test_half_precision_halves_the_size():
    manager = HookManager(zoo.zoo("gpt2"))
    full = manager.capture(zoo.tokens(), "z")
    half = manager.capture(zoo.tokens(), "z", dtype=torch.float16)
    assert half["z", 0].dtype == torch.float16
    assert half.nbytes * 2 == full.nbytes
    torch.testing.assert_close(half["z", 0].float(), full["z", 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [0, 5, 100, -40])
def test_a_file_cut_short_says_so(acts, tmp_path, keep):
    path = tmp_path / "acts.safetensors"
    acts.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut short"):
        mi.Activations.load(path)


def test_a_foreign_file_says_so(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not of activations"):
        mi.Activations.load(tmp_path / "other.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not of activations"):
        mi.Activations.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no activation file"):
        mi.Activations.load(tmp_path / "absent.safetensors")


def test_a_full_disk_leaves_the_old_file_as_it_was(acts, tmp_path, monkeypatch):
    path = tmp_path / "acts.safetensors"
    acts.save(path)
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mechinterp.activations.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        acts.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_axes_are_labelled(acts):
    z = acts.to_xarray("z")
    assert z.dims == ("layer", "prompt", "slot", "head", "d_head")
    assert z.layer.values.tolist() == [0, 1, 2]
    assert z.position.values.tolist() == [[0, 3], [0, 4], [0, 5]]
    whole = HookManager(zoo.zoo("llama")).capture(zoo.tokens(), "z")
    array = whole.to_xarray("z")
    assert array.dims == ("layer", "prompt", "position", "head", "d_head")
    picked = array.sel(layer=1, prompt=0, position=4, head=2).to_numpy()
    assert torch.equal(torch.tensor(picked), whole["z", 1][0, 4, 2])


def test_padding_is_not_a_number_in_the_labelled_array():
    rows = [r[: 4 + i].tolist() for i, r in enumerate(zoo.tokens(2))]
    array = (
        HookManager(zoo.zoo("gpt2"))
        .capture(rows, "resid_post", layers=0)
        .to_xarray("resid_post")
    )
    assert array.isnull().all("d_model").sel(layer=0).values.tolist() == [
        [False] * 4 + [True],
        [False] * 5,
    ]


def test_they_say_what_they_hold(acts):
    assert "3 prompts, embed, z at 3 layers, k at 3 layers" in repr(acts)
