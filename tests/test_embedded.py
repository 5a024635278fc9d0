"""The model in the package is what its card says: small, whole, and able to copy."""

from pathlib import Path
from typing import Any

import mechinterp as mi

FOLDER = Path(mi.__file__).parent / "data" / "embedded"


def test_it_has_learned_induction():
    """On 64 random tokens given twice, the second copy is at least 5 nats easier."""
    model = mi.load_model()
    loss = mi.Text.from_tokens(model, mi.repeated_tokens(model, 32, 64, seed=3)).loss(model)
    first, second = loss.isel(position=slice(1, 65)), loss.isel(position=slice(65, None))
    assert float(first.mean() - second.mean()) >= 5


def test_it_is_small_and_has_a_card():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6
    model = mi.load_model()
    assert 4e6 <= sum(p.numel() for p in model.original_model.parameters()) <= 5.5e6
    assert (len(model.blocks), model.cfg.n_heads, model.cfg.n_ctx) == (4, 8, 512)
    assert "bits per byte" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_it_goes_on_from_text_as_plain_hugging_face_does():
    model = mi.load_model()
    told = {"max_new_tokens": 4, "do_sample": False}
    text = str(model.generate("The king was", verbose=False, **told))
    tokenizer = model.tokenizer
    tokens = mi.Text.from_strings(model, ["The king was"]).prompts.tokens
    module: Any = mi.unwrap(model)
    plain = module.generate(tokens, pad_token_id=0, **told)[0, -4:]
    assert text.startswith("The king was") and text.endswith(tokenizer.decode(plain))
