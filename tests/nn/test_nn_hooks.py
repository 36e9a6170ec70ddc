"""Tools that act on the mixes and the norm of an attention: what they compute is kept, or refused in a
sentence."""

import importlib.util

import published
import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune

import vitdiv_kernels as vd
from vitdiv_kernels.nn import effective

pytestmark = pytest.mark.usefixtures("one_thread")

MIXES = {vd.nn.ReAttention: ["reatten_matrix"], vd.nn.TalkingHeadsAttention: ["proj_l", "proj_w"]}
BOTH = pytest.mark.parametrize("cls", MIXES, ids=lambda cls: cls.__name__)


def made(cls, **options):
    """An attention in float64 with biases that count."""
    torch.manual_seed(1)
    attn = cls(24, 4, **options).double()
    for name, parameter in attn.named_parameters():
        if name.startswith(("reatten", "proj_", "var_norm")):
            nn.init.normal_(parameter, std=0.5)
    return attn


def mixes(attn):
    return [getattr(attn, name) for name in MIXES[type(attn)]]


def standardise(module):
    """A parametrisation by a hook of the user's own."""

    def set_weight(module, inputs):
        module.weight = (module.raw - module.raw.mean()) / module.raw.std()

    module.raw = nn.Parameter(module.weight.detach())
    del module.weight
    module.register_forward_pre_hook(set_weight)


TOOLS = {
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "pruned weight": lambda module: prune.l1_unstructured(module, "weight", amount=0.3),
    "pruned bias": lambda module: prune.random_unstructured(module, "bias", amount=0.5),
    "a hook": standardise,
}


def treated(cls, tool):
    attn = made(cls)
    for module in mixes(attn):
        TOOLS[tool](module)
    return attn


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
@BOTH
def test_what_makes_a_weight_before_each_call(cls, tool, compiled, pytestconfig):
    of_every_other_tool = (list(TOOLS).index(tool) + list(MIXES).index(cls)) % 2
    if compiled and of_every_other_tool and not pytestconfig.getoption("--every-case"):
        pytest.skip("compiled with the other class")
    attn, like = treated(cls, tool), treated(cls, tool)
    torch._dynamo.reset()
    forward = torch.compile(attn, fullgraph=True, backend="aot_eager") if compiled else None
    published.assert_published(attn, like=like, forward=forward)


def test_pruning_of_all_weights_together():
    def pruned():
        attn = made(vd.nn.ReAttention)
        weights = [(attn.qkv, "weight"), (attn.reatten_matrix, "weight"), (attn.var_norm, "weight")]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=0.5)
        return attn

    published.assert_published(pruned(), like=pruned())


class LoraLinear(nn.Module):
    """What peft's LoRA layers are, as far as they are read."""

    def __init__(self, base, dropout=0.0):
        super().__init__()
        kind = {"dtype": base.weight.dtype, "bias": False}
        conv = isinstance(base, nn.Conv2d)
        heads = base.weight.shape[0]
        down, up = (nn.Conv2d(heads, 2, 1, **kind), nn.Conv2d(2, heads, 1, **kind)) if conv else (
            nn.Linear(heads, 2, **kind), nn.Linear(2, heads, **kind)
        )  # fmt: skip
        self.base_layer = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout) if dropout else nn.Identity()})
        self.active_adapters, self.disable_adapters, self.merged, self.lora_variant = (
            ["default"],
            False,
            False,
            {},
        )

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def get_delta_weight(self, adapter):
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return (3.0 * up.flatten(1) @ down.flatten(1)).view_as(self.base_layer.weight)

    def forward(self, x):
        if self.disable_adapters:
            return self.base_layer(x)
        down, up, dropout = self.lora_A["default"], self.lora_B["default"], self.lora_dropout["default"]
        return self.base_layer(x) + 3.0 * up(down(dropout(x)))


LoraLinear.__module__, LoraLinear.__name__ = "peft.tuners.lora.layer", "Linear"


def with_stand_in(attn, **options):
    for name in MIXES[type(attn)]:
        setattr(attn, name, LoraLinear(getattr(attn, name), **options))
    return attn


def with_peft(attn, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=MIXES[type(attn)], init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, attn)
    return attn.double()


@pytest.fixture(params=[with_stand_in, with_peft])
def adapt(request):
    """Gives the mixes of an attention LoRA adapters."""
    if request.param is with_peft and importlib.util.find_spec("torchvision"):
        request.getfixturevalue("torchvision")  # peft's imports import it
    return request.param


@BOTH
def test_lora(cls, adapt):
    attn = adapt(made(cls))
    for module in mixes(attn):
        assert module.lora_A["default"].weight.requires_grad
        assert not module.base_layer.weight.requires_grad
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    adapted = attn.eval()(x)
    published.assert_published(attn.train())
    for module in mixes(attn):
        if adapt is with_peft:
            module.enable_adapters(False)
        else:
            module.disable_adapters = True
    attn.eval()
    torch.testing.assert_close(attn(x), published.called_on_maps(attn, x))
    assert (attn(x) - adapted).abs().max() > 1e-3


def test_lora_that_is_no_fixed_weight_is_refused(adapt):
    dropout = {"dropout": 0.5} if adapt is with_stand_in else {"lora_dropout": 0.5}
    attn = adapt(made(vd.nn.ReAttention), **dropout)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"reatten_matrix must be LoRA without dropout, got lora_dropout=0.5: its"
    ):
        attn(x)
    torch.testing.assert_close(attn.eval()(x), published.reattention(attn, x))
    if adapt is with_peft:
        attn = adapt(made(vd.nn.ReAttention), use_dora=True)
        with pytest.raises(TypeError, match="must be plain LoRA, got a variant as adapter 'default'"):
            attn(x)


def fold(attn):
    attn.reatten_matrix = fusion.fuse_conv_bn_eval(attn.reatten_matrix, attn.var_norm)
    attn.var_norm = nn.Identity()
    return attn


def fuse_modules(attn):
    """It knows torch's own classes alone, which attentions of the published initial values are made of."""
    return torch.ao.quantization.fuse_modules(attn, ["reatten_matrix", "var_norm"])


@pytest.mark.parametrize(("fuse", "init"), [(fold, "identity"), (fuse_modules, "conv")])
def test_batch_norm_folded_into_the_mix(fuse, init):
    attn = made(vd.nn.ReAttention, mix_init=init).eval()
    attn.var_norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    expected = published.reattention(attn, x)
    fused = fuse(attn)
    assert type(fused.var_norm) is nn.Identity
    torch.testing.assert_close(fused(x), expected)


class Quantised(torch.Tensor):
    """A weight as torchao makes them: a Parameter in a Linear, of another package's class."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_ = data

    def __tensor_flatten__(self):
        return ["data_"], None

    @staticmethod
    def __tensor_unflatten__(tensors, *_):
        return Quantised(tensors["data_"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [x.data_ if isinstance(x, cls) else x for x in args]
        return func(*args, **kwargs or {})


def quantise(attn):
    # not through setattr: register_parameter detaches
    attn.proj_l._parameters["weight"] = Quantised(attn.proj_l.weight.detach())


def replace_forward(attn):
    attn.reatten_matrix.forward = lambda x: 2 * x


def hook(module, *_):
    return None


def ones(module, inputs):
    return torch.ones(2, 4, 5, 5, dtype=torch.float64)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


RE, TALKING = vd.nn.ReAttention, vd.nn.TalkingHeadsAttention
# class, what is done to it, what the sentence says
REFUSED = {
    "group norm": (
        RE,
        lambda attn: setattr(attn, "var_norm", nn.GroupNorm(1, 4, dtype=torch.float64)),
        "var_norm must be a BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d, got GroupNorm",
    ),
    "layers": (
        RE,
        lambda attn: setattr(attn, "reatten_matrix", nn.Sequential(attn.reatten_matrix, nn.Softplus())),
        "reatten_matrix must be a Conv2d or a Linear, got Sequential",
    ),
    "a subclass": (
        RE,
        lambda attn: setattr(attn, "reatten_matrix", Doubled(4, 4, 1, dtype=torch.float64)),
        "reatten_matrix must be a Conv2d or a Linear, got Doubled",
    ),
    "kernel": (
        RE,
        lambda attn: setattr(attn, "reatten_matrix", nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)),
        r"reatten_matrix must be a Conv2d of kernel 1, .*, got Conv2d\(4, 4, kernel_size=\(3, 3\)",
    ),
    "groups": (
        RE,
        lambda attn: setattr(attn, "reatten_matrix", nn.Conv2d(4, 4, 1, groups=2, dtype=torch.float64)),
        "reatten_matrix must be a Conv2d of kernel 1, .*groups=2",
    ),
    "forward hook": (
        RE,
        lambda attn: attn.reatten_matrix.register_forward_hook(lambda module, inputs, out: 2 * out),
        "reatten_matrix must be without hooks on its output and gradients, got .*lambda",
    ),
    "hook of the norm": (
        RE,
        lambda attn: attn.var_norm.register_forward_hook(hook),
        "var_norm must be without hooks on its output and gradients, got hook",
    ),
    "backward hook": (
        TALKING,
        lambda attn: attn.proj_w.register_full_backward_hook(hook),
        "proj_w must be without hooks on its output and gradients, got hook",
    ),
    "reads the input": (
        TALKING,
        lambda attn: attn.proj_l.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
        "proj_l must be without hooks that read its input, got .*lambda.*, which failed",
    ),
    "changes the input": (
        RE,
        lambda attn: attn.reatten_matrix.register_forward_pre_hook(ones),
        "reatten_matrix must be without hooks that change its input, got ones",
    ),
    "forward": (RE, replace_forward, "reatten_matrix must be .*, got one whose forward was replaced"),
    "quantised": (TALKING, quantise, "proj_l must be a module of plain tensors, got a Quantised in it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_or_called_by_the_reference(case):
    cls, change, sentence = REFUSED[case]
    attn = made(cls)
    change(attn)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=f'{sentence}.*: its tensors are read .* give the attention backend="reference"'
    ):
        attn(x)
    attn.backend = "reference"
    torch.testing.assert_close(attn(x), published.called_on_maps(attn, x))


def test_the_gram_matrix_comes_along_where_modules_are_called():
    attn = made(RE, backend="reference").eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    expected = attn(x, return_gram=True)
    attn.reatten_matrix.register_forward_hook(hook)
    torch.testing.assert_close(attn(x, return_gram=True), expected)


def test_dynamic_quantisation_is_refused():
    attn = torch.ao.quantization.quantize_dynamic(TALKING(24, 4).eval(), {nn.Linear})
    with pytest.raises(
        TypeError, match="proj_l must be a Conv2d or a Linear, got Linear: its tensors are read"
    ):
        attn(torch.randn(2, 5, 24))


def test_tensors_given_for_one_call():
    attn = made(RE)
    given = {name: torch.randn_like(value) for name, value in attn.named_parameters()}
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    out = torch.func.functional_call(attn, given, x)
    attn.load_state_dict(given, strict=False)
    torch.testing.assert_close(out, published.reattention(attn, x))


def images():
    return torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def steps(attn, forward):
    """The outputs of two steps, their gradients added up."""
    outputs = []
    for _ in range(2):
        out = forward(images())
        out.square().sum().backward()
        outputs.append(out.detach())
    return outputs


def sharded():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    found = {}
    for whole in (False, True):
        attn = made(RE)
        # whole or not: FSDP2 frees what it gathered after a forward, but for the outermost module
        for module in (attn.reatten_matrix, attn.var_norm, *[attn] * whole):
            fully_shard(module, mesh=dist.init_device_mesh("cpu", (2,)))
        outputs = steps(attn, attn)
        grads = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in attn.parameters()
        ]
        found[whole] = outputs, grads, list(attn.buffers())
    dist.destroy_process_group()
    return found


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_fsdp_of_the_mix_and_the_norm():
    """Two processes with half of each; on the same images they give what one gives."""
    attn = made(RE)
    outputs = steps(attn, lambda x: published.reattention(attn, x))
    expected = outputs, [p.grad for p in attn.parameters()], list(attn.buffers())
    for found in together(2, sharded):
        assert found.keys() == {False, True}
        for ours in found.values():
            torch.testing.assert_close(ours, expected)


def test_what_others_read():
    """effective_mix and effective_norm, for measures that fold the norm into the mix."""
    attn = treated(RE, "old weight_norm")
    mix, bias = effective.effective_mix(attn)
    norm = effective.effective_norm(attn)
    attn.reatten_matrix(torch.zeros(1, 4, 1, 1, dtype=torch.float64))  # its hook sets the weight
    torch.testing.assert_close(mix, attn.reatten_matrix.weight.flatten(1))
    assert bias is attn.reatten_matrix.bias
    assert (norm.kind, norm.from_batch, norm.eps) == ("batch", True, 1e-5)
    assert norm.weight is attn.var_norm.weight
    assert norm.running_var is attn.var_norm.running_var
    assert not effective.effective_norm(attn.eval()).from_batch
    attn.var_norm = nn.GroupNorm(1, 4)
    with pytest.raises(TypeError, match="got GroupNorm"):
        effective.effective_norm(attn)
