"""bf16 on a CPU: with units for it and without, the same numbers."""

import copy

import pytest
import torch
from tdm.training.precision import autocast
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

UNITS = {True: {"avx512_bf16": True}, False: {"avx2": True}}


class Net(nn.Module):
    """Every kind of product, an attention, and operations that autocast leaves in float32."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16), nn.Linear(16, 4, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = self.norm(self.first(x))
        x = x + F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3).squeeze(1)
        x = torch.bmm(torch.matmul(x, x.transpose(1, 2)).softmax(-1), x) + x.matmul(x.transpose(1, 2) @ x)
        return self.last(x)


def run(net, x, monkeypatch, units):
    """The output, and the gradients of input and weights."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: UNITS[units])
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    with autocast("bf16"):
        out = net(x)
    out.float().square().mean().backward()
    return out, {"x": x.grad, **{name: p.grad for name, p in net.named_parameters()}}


@pytest.fixture
def case():
    torch.manual_seed(0)
    return Net(), torch.randn(2, 3, 6, 6)


def test_a_cpu_without_units_computes_what_one_with_them_does(case, monkeypatch):
    (there, wanted), (here, got) = (run(*case, monkeypatch, units) for units in (True, False))
    assert here.dtype == there.dtype == torch.bfloat16
    assert (here.float() - there.float()).norm() < 0.02 * there.float().norm()  # they sum in another order
    for name, gradient in wanted.items():
        assert got[name].dtype == gradient.dtype == torch.float32
        assert (got[name] - gradient).norm() < 0.02 * gradient.norm(), name


def test_without_units_a_product_is_that_of_rounded_numbers(monkeypatch):
    """Both passes agree to the last bit, and nothing is rounded that autocast would not round."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: UNITS[False])
    torch.manual_seed(0)
    x, w, g = (torch.randn(shape) for shape in ((5, 7), (3, 7), (5, 3)))
    inputs = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    with autocast("bf16"):
        out = F.linear(*inputs)
        assert (x + w[:1]).dtype == torch.float32
        assert F.linear(x.double(), w.double()).dtype == torch.float64
    out.backward(g.bfloat16())

    def rounded(value):
        return value.bfloat16().float()

    assert torch.equal(out, F.linear(rounded(x), rounded(w)).bfloat16())
    assert torch.equal(inputs[0].grad, rounded(rounded(g) @ rounded(w)))
    assert torch.equal(inputs[1].grad, rounded(rounded(g).T @ rounded(x)))


class Products(TorchDispatchMode):
    """The dtypes in which torch multiplies, forward and backward."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"):
            self.dtypes |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("units", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_all_products_run_in_what_the_cpu_is_fast_in(case, monkeypatch, units, dtype):
    with Products() as products:
        run(*case, monkeypatch, units)
    assert products.dtypes == {dtype}
