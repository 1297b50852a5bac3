"""Three roles on one base: each call runs its own adapter, gradients go to it alone, the base never changes."""

import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.schedule import NoiseSchedule
from tdm.training.roles import ROLES, AdapterRoles, CopyRoles, Ema
from torch import nn
from torch.utils.checkpoint import checkpoint

FLOW = NoiseSchedule.flow()


class TinyNet(nn.Module):
    """Two checkpointable blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 4)
        self.gradient_checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def forward(self, x):
        for block in (lambda h: self.first(h).tanh(), lambda h: self.second(h).tanh()):
            x = checkpoint(block, x, use_reentrant=False) if self.gradient_checkpointing else block(x)
        return x


def tiny():
    return TinyNet(), lambda base, x, t, _cond: base(x) * t[:, None] / 1000, ["first", "second"], (4,)


def pixart():
    from diffusers import PixArtTransformer2DModel

    base = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=8,
        use_additional_conditions=False,
    )

    def call(base, x, timesteps, _cond):
        text = torch.ones(len(x), 3, 8)
        extra = {"resolution": None, "aspect_ratio": None}
        return base(x, encoder_hidden_states=text, timestep=timesteps, added_cond_kwargs=extra, return_dict=False)[0]

    return base, call, ["to_q", "to_k", "to_v", "to_out.0"], (4, 8, 8)


def make(network=tiny, checkpointing=False, seed=0):
    torch.manual_seed(0)
    base, call, targets, shape = network()
    if checkpointing:
        base.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(seed)
    roles = AdapterRoles(
        base,
        call,
        schedule=FLOW,
        prediction_type="flow_prediction",
        targets=dict.fromkeys(ROLES, targets),
        rank={"student": 3, "critic": 2},
        alpha={"student": None, "critic": 4.0},
        generator=generator,
    )
    for role in ("student", "critic"):  # as after training: both factors are set, each role's differently
        for p in roles.parameters(role):
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    x = torch.randn(3, *shape, generator=generator)
    return roles, x, torch.tensor([250.0, 500.0, 900.0], dtype=torch.float64)


def grads(roles):
    return {role: [p.grad for p in roles.parameters(role)] for role in ("student", "critic")}


def test_roles_start_as_the_teacher_and_then_differ():
    torch.manual_seed(0)  # of some draws, one in fifty, the product rounds otherwise than the one here
    base, call, targets, shape = tiny()
    kwargs = {"schedule": FLOW, "prediction_type": "flow_prediction", "targets": dict.fromkeys(ROLES, targets)}
    x, t = torch.randn(3, *shape), torch.full((3,), 500.0, dtype=torch.float64)
    before = base(x) * 0.5
    fresh = AdapterRoles(
        base,
        call,
        rank={"student": 2, "critic": 2},
        alpha={"student": None, "critic": None},
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )
    for predict in (fresh.student, fresh.critic, fresh.teacher):
        assert torch.equal(predict(x, t, {})[0], x - 0.5 * before)
    roles, x, t = make()
    outputs = [predict(x, t, {})[0] for predict in (roles.student, roles.critic, roles.teacher, roles.student)]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert torch.equal(outputs[0], outputs[3])


def test_lora_scale_is_alpha_over_rank():
    roles, x, _ = make()
    layer = roles.base.first
    roles._network("critic")
    a, b = layer.lora_A["critic"].weight, layer.lora_B["critic"].weight
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ a.T @ b.T * (4.0 / 2))


def copies(network, checkpointing=False):
    torch.manual_seed(0)
    base, call, _, shape = network()
    if checkpointing:
        base.enable_gradient_checkpointing()
    roles = CopyRoles(base, call, schedule=FLOW, prediction_type="flow_prediction")
    generator = torch.Generator().manual_seed(0)
    for role in ("student", "critic"):
        for p in roles.parameters(role):
            p.data += torch.randn(p.shape, generator=generator) * 0.1
    return roles, torch.randn(3, *shape, generator=generator), torch.tensor([250.0, 500.0, 900.0], dtype=torch.float64)


def test_whole_copies_start_as_the_teacher_train_alone_and_leave_it_alone():
    base, call, _, shape = tiny()
    x, t = torch.randn(3, *shape), torch.full((3,), 500.0, dtype=torch.float64)
    roles = CopyRoles(base.half(), call, schedule=FLOW, prediction_type="flow_prediction")
    assert all(p.dtype == torch.float32 for role in ("student", "critic") for p in roles.parameters(role))
    roles.base.float()
    assert torch.equal(roles.student(x, t, {})[0], roles.teacher(x, t, {})[0])
    for network in (tiny, pixart):
        roles, x, t = copies(network)
        before = {name: p.clone() for name, p in roles.base.named_parameters()}
        teacher = roles.teacher(x, t, {})[0]
        assert not torch.allclose(roles.student(x, t, {})[0], teacher)
        roles.critic(x, t, {})[0].square().mean().backward()
        assert any(g is not None and g.abs().sum() > 0 for g in grads(roles)["critic"])
        assert all(g is None for g in grads(roles)["student"])
        assert all(p.grad is None for p in roles.base.parameters())
        torch.optim.SGD(roles.parameters("critic"), lr=1.0).step()
        assert all(torch.equal(p, before[name]) for name, p in roles.base.named_parameters())
        assert torch.equal(roles.teacher(x, t, {})[0], teacher)


@pytest.mark.parametrize("network", [tiny, pixart])
@pytest.mark.parametrize("role", ["student", "critic"])
def test_gradients_reach_the_named_role_only(network, role):
    roles, x, t = make(network)
    roles.teacher(x, t, {})
    getattr(roles, role)(x, t, {})[0].square().mean().backward()
    other = "critic" if role == "student" else "student"
    assert all(g is not None and g.abs().sum() > 0 for g in grads(roles)[role])
    assert all(g is None for g in grads(roles)[other])
    trained = {id(p) for r in ("student", "critic") for p in roles.parameters(r)}
    assert all(p.grad is None and not p.requires_grad for p in roles.base.parameters() if id(p) not in trained)
    assert all(p.requires_grad for r in ("student", "critic") for p in roles.parameters(r))


def losses_in_training_order(roles, x, t):
    """Return the gradients of passes in training order: others run between the student's forward and backward."""
    student = roles.student(x, t, {})[0]
    roles.critic(student.detach(), t, {})[0].square().mean().backward()
    roles.teacher(x, t, {})
    with torch.no_grad():
        roles.critic(x, t, {})
    student.square().mean().backward()
    return grads(roles)


@pytest.mark.parametrize("network", [tiny, pixart])
def test_checkpointing_changes_no_gradient(network):
    """A recomputed forward must run the adapter of its own role, not of the last one that ran (see peft #2832)."""
    for kind in (make, copies):
        plain = losses_in_training_order(*kind(network))
        recomputed = losses_in_training_order(*kind(network, checkpointing=True))
        for role in ("student", "critic"):
            for a, b in zip(plain[role], recomputed[role], strict=True):
                torch.testing.assert_close(a, b)


def test_guided_teacher_is_one_batch_of_both():
    roles, x, t = make()
    sizes = []
    call = roles.call
    roles.call = lambda base, x, t, cond: sizes.append(len(x)) or call(base, x + cond["c"], t, cond)
    cond, null = {"c": torch.ones(3, 1)}, {"c": torch.zeros(3, 1)}
    (c, ce), (u, ue) = roles.teacher(x, t, cond), roles.teacher(x, t, null)
    x0, eps = roles.guided_teacher(x, t, cond, null, 3.0)
    assert sizes == [3, 3, 6]
    torch.testing.assert_close(x0, u + 3 * (c - u))
    torch.testing.assert_close(eps, ue + 3 * (ce - ue))
    assert torch.equal(roles.guided_teacher(x, t, cond, null, 1.0)[0], c)
    assert sizes[3:] == [3]


def test_adapters_depend_on_the_given_generator_only():
    def fresh(seed):
        base, call, targets, _ = tiny()
        torch.manual_seed(seed + 100)
        return AdapterRoles(
            base,
            call,
            schedule=FLOW,
            prediction_type="flow_prediction",
            targets=dict.fromkeys(ROLES, targets),
            rank={"student": 2, "critic": 2},
            alpha={"student": None, "critic": None},
            generator=torch.Generator().manual_seed(0),
        ).state("student")

    one, two = fresh(1), fresh(2)
    assert list(one) == ["first.lora_A.weight", "first.lora_B.weight", "second.lora_A.weight", "second.lora_B.weight"]
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["first.lora_A.weight"].abs().sum() > 0


def test_wrong_layers_and_wrong_ranks_are_refused():
    base, call, _, _ = tiny()
    with pytest.raises(TDMError, match="no student adapter fits the base"):
        AdapterRoles(
            base,
            call,
            schedule=FLOW,
            prediction_type="flow_prediction",
            targets={"student": ["to_q"], "critic": ["to_q"]},
            rank={"student": 2, "critic": 2},
            alpha={"student": None, "critic": None},
            generator=torch.Generator(),
        )
    roles, *_ = make()
    with pytest.raises(TDMError, match="another rank"):
        roles.load("critic", roles.state("student"))


def test_ema_is_the_running_mean_and_is_swapped_in_and_out():
    roles, x, t = make()
    ema = Ema(roles, decay=0.5, warmup=False)
    first = roles.state("student")
    for p in roles.parameters("student"):
        p.data += 1.0
    ema.update()
    torch.testing.assert_close(ema.weights, {key: value + 0.5 for key, value in first.items()})
    raw = roles.student(x, t, {})[0]
    with ema.applied():
        assert not torch.equal(roles.student(x, t, {})[0], raw)
    assert torch.equal(roles.student(x, t, {})[0], raw)
    short = Ema(roles, decay=0.999)
    for p in roles.parameters("student"):
        p.data += 1.0
    before = {key: value.clone() for key, value in short.weights.items()}
    short.update()  # (1 + 0) / (10 + 0) of the past
    torch.testing.assert_close(short.weights, {key: value + 0.9 for key, value in before.items()})


def test_bf16_autocast_keeps_adapters_and_predictions_in_float32():
    roles, x, t = make()
    roles.precision, roles.prediction_type = "bf16", "epsilon"  # eps is then the network's own output
    roles.call = lambda base, x, _t, _cond: base(x)
    inner = []
    roles.base.first.register_forward_hook(lambda _module, _args, out: inner.append(out.dtype))
    x0, eps = roles.student(x, t, {})
    x0.mean().backward()
    assert inner == [torch.bfloat16]
    assert x0.dtype == eps.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in roles.parameters("student"))
