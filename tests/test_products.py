"""Products by oneDNN: the same numbers within rounding, and only where they are meant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import a_task, assert_equal_logits, plain_logits
from torch.nn import functional
from zoo import zoo

import mechinterp as mi
from mechinterp.edits import Zero
from mechinterp.engine import products
from mechinterp.engine.products import fast_products, mkl_is_held_back
from mechinterp.sites import site_layers

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture
def forced(monkeypatch):
    """oneDNN for products of any size, whatever the processor; says how many there were."""
    counted: list[torch.Size] = []
    real = products._pays

    def pays(x, weight):
        found = real(x, weight)
        counted.extend([x.shape] * found)
        return found

    monkeypatch.setattr(products, "mkl_is_held_back", lambda: True)
    monkeypatch.setattr(products, "_pays", pays)
    for name in ("_LEAST", "_ROWS", "_ROWS_TO_COPY"):
        monkeypatch.setattr(products, name, 1)
    return counted


def weight_of(n_out: int, n_in: int, layout: str) -> torch.Tensor:
    """A weight as linear layers keep it, as GPT-2's do, or a slice of its joint one."""
    if layout == "linear":
        return torch.randn(n_out, n_in)
    if layout == "conv":
        return torch.randn(n_in, n_out).t()
    return torch.randn(n_in, 3 * n_out)[:, n_out : 2 * n_out].t()


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["linear", "conv", "slice"]),
    st.booleans(),
)
def test_linear_and_addmm_are_equal_to_a_product_in_double(rows, n_in, n_out, layout, biased):
    x, weight = torch.randn(*rows, n_in), weight_of(n_out, n_in, layout)
    bias = torch.randn(n_out) if biased else None
    wanted = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(products, "mkl_is_held_back", lambda: True)
        for name in ("_LEAST", "_ROWS", "_ROWS_TO_COPY"):
            patch.setattr(products, name, 1)
        with fast_products():
            found = functional.linear(x, weight, bias)
            flat = x.flatten(0, -2)
            added = torch.addmm(torch.zeros(n_out) if bias is None else bias, flat, weight.t())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(added.double(), wanted.flatten(0, -2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox", "native", "bert"])
def test_the_engine_equals_plain_runs_with_them(forced, name):
    model = zoo(name)
    task = a_task(model)
    cells = [mi.Cell(Zero("z", layers=layer, heads=0)) for layer in site_layers(model, "z")]
    mine = mi.cell_logits(model, task, cells)
    assert forced
    del forced[:]
    plain = plain_logits(model, task, cells, "clean")
    assert not forced  # the oracle is torch's own
    assert_equal_logits(mine, plain)


def test_they_leave_alone_what_they_are_not_for(forced, monkeypatch):
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4)
    with fast_products():  # gradients are on
        functional.linear(x, weight).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        with fast_products():
            assert functional.linear(x.double(), weight.double()).dtype == torch.float64
            functional.linear(x.bfloat16(), weight.bfloat16())
            torch.addmm(x, x, weight, alpha=2.0)  # an addend of the product's own shape
            torch.addmm(x.detach(), x, weight)
        with monkeypatch.context() as off:
            off.setattr(torch.backends.mkldnn, "enabled", False)
            with fast_products():
                functional.linear(x, weight)
        assert len(forced) == 1  # asked about the last addmm, whose addend is no bias
        functional.linear(x, weight)
    assert len(forced) == 1


def test_small_products_stay_with_torch():
    few, many = torch.randn(8, 1024), torch.randn(4096, 256)
    assert not products._pays(few, torch.randn(1024, 1024))
    assert not products._pays(torch.randn(64, 64), torch.randn(64, 64))
    assert products._pays(many, torch.randn(256, 256))
    assert products._pays(many, torch.randn(256, 256).t())
    sliced = weight_of(256, 256, "slice")
    assert products._pays(many, sliced)
    assert not products._pays(many[:256], sliced)


def test_only_amd_processors_with_wide_instructions_hold_mkl_back(monkeypatch, tmp_path):
    said = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "Path", lambda _: said)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for vendor, capability, expected in (
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ):
        said.write_text(f"vendor_id\t: {vendor}\n")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert mkl_is_held_back.__wrapped__() is expected
    said.unlink()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products.platform, "processor", lambda: "Family 26, AuthenticAMD")
    assert mkl_is_held_back.__wrapped__()
