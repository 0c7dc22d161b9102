"""Float64 layer by layer: the bits of a whole float64 copy, and none of its memory."""

import contextlib
import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.reference import copy_module, layers, run_cpu
from harness.reference.layers import has_layers, layered
from harness.reference.randomness import Draws
from harness.reference.runs import refer
from harness.tests.needs import import_transformers
from harness.torch_private import aten_operator

CPU = torch.device("cpu")


class Tied(nn.Module):
    """Tied weights, and a parent that reads its child's weight."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.head.weight = self.emb.weight

    def forward(self, x):
        tokens = (x.abs() * 10).long() % 11
        return (
            self.head(self.emb(tokens)),
            F.linear(x, self.emb.weight),
            F.linear(x.to(self.emb.weight.dtype), self.head.weight),
        )


class Counting(nn.Module):
    """Writes into its buffers, and into a parameter."""

    def __init__(self):
        super().__init__()
        self.lin, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("sum", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        self.sum.add_(x.mean(0))
        self.scale.mul_(1.1)
        return self.lin(x) * self.calls + self.sum * self.scale


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 16)), nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x):
        routed = [F.silu(x @ self.up[index]) @ self.down[index] for index in range(3)]
        offs = torch.tensor([2, 4, 6], dtype=torch.int32)
        return sum(routed), torch._grouped_mm(x[:6], self.up, offs=offs)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 8, num_layers=2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.lstm(x[None])[0])


class Listed(nn.Module):
    """Keeps weights in torch's lists and tables, calls a child with other weights, copies itself, asks for dtypes."""

    def __init__(self):
        super().__init__()
        self.many = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(3)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(8))})
        self.lin = nn.Linear(8, 8)
        self.plain = [self.lin.weight]

    def forward(self, x):
        for weight in self.many:
            x = x.to(next(self.parameters()).dtype) @ weight
        x = torch.func.functional_call(self.lin, {"bias": self.named["a"]}, (x,))
        assert all(tensor.dtype == torch.float64 for tensor in self.state_dict().values()) or x.dtype != torch.float64
        return copy.deepcopy(self.lin)(x) + F.linear(x, self.plain[0]) + F.linear(x, **dict(self.lin._parameters))


def _normed():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.BatchNorm1d(8), nn.LayerNorm(8), nn.utils.weight_norm(nn.Linear(8, 8)),
    )  # fmt: skip
    with torch.no_grad():
        model.eval()(torch.ones(2, 8))  # the older weight_norm can be copied after a run only
    return model


def _encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Unflatten(0, (1, -1)), nn.TransformerEncoder(layer, 2), nn.Flatten(0, 1))


MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)),
    "tied": Tied, "writing": Counting, "experts": Experts,
    "lstm": Recurrent, "lists": Listed, "norms": _normed, "encoder": _encoder,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)),
}  # fmt: skip
if aten_operator("_grouped_mm") is None:  # torch 2.7 and older
    del MODELS["experts"]


def _made(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    return copy_module(model, dtype=dtype, device=CPU)


def _leaves(value):
    return [value] if isinstance(value, torch.Tensor) else [leaf for item in value for leaf in _leaves(item)]


def _run(model, x):
    return _leaves(run_cpu(model, x.clone(), forward=None, dtype=torch.float64)[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_gives_the_bits_of_a_whole_float64_copy(name, dtype):
    model = _made(name, dtype)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    whole, lean = copy_module(model, dtype=torch.float64, device=CPU), layered(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(3):  # what a model writes into itself must go on from run to run as well
        for left, right in zip(_run(lean, x), _run(whole, x), strict=True):
            assert left.dtype == torch.float64 and torch.equal(left, right)
    assert all(torch.equal(item, before[key]) for key, item in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_models_of_transformers_give_the_same_bits(dtype):
    transformers = import_transformers()
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    ids = torch.arange(12)[None]
    llama = transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
    mixtral = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)
    makers = [lambda: transformers.LlamaForCausalLM(llama), lambda: transformers.MixtralForCausalLM(mixtral)]
    makers.append(lambda: transformers.BertModel(transformers.BertConfig(**sizes)))
    for make in makers:
        torch.manual_seed(0)
        model = copy_module(make().eval().requires_grad_(False), dtype=dtype, device=CPU)
        whole, lean = copy_module(model, dtype=torch.float64, device=CPU), layered(model)
        outputs = [run_cpu(item, ids, forward=_first, dtype=torch.float64)[0] for item in (lean, whole)]
        assert outputs[0].dtype == torch.float64 and torch.equal(*outputs)


def _first(model, ids):
    return model(ids)[0]


def test_no_more_than_one_module_is_wide_at_a_time():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]).eval().requires_grad_(False)
    lean, alive, most = layered(model), weakref.WeakSet(), []

    def look(module, args, output):
        alive.update([module.weight, module.bias])
        gc.collect()
        most.append(len(alive))

    for item in lean:
        item.register_forward_hook(look)
    lean(torch.ones(2, 8).double())
    assert most == [2] * 5
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(value.data_ptr() in own for module in lean for value in dict.values(module._parameters))


def test_a_weight_is_one_object_while_it_is_in_use():
    lean = layered(Tied().requires_grad_(False))
    assert lean.emb.weight is lean.head.weight and lean.emb.weight.dtype == torch.float64
    assert [name for name, _ in lean.named_parameters()] == ["emb.weight", "head.bias"]
    assert lean.emb._parameters.pop("weight").dtype == torch.float64 and "weight" not in lean.emb._parameters


def test_compiled_models_have_no_layers():
    linear = nn.Linear(2, 2)
    assert has_layers(linear)
    with warnings.catch_warnings():  # newer torch says that it is deprecated
        warnings.simplefilter("ignore")
        assert not has_layers(nn.Sequential(torch.jit.script(linear)))
    assert not has_layers(torch.compile(linear, backend="eager"))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("twice", [False, True])
def test_a_reference_in_float64_holds_few_weights_at_a_time(monkeypatch, twice):
    living = []
    wide = layers._Casts.wide

    def counted(self, parameter, owner):
        result = wide(self, parameter, owner)
        living.append(len(self._alive))
        return result

    monkeypatch.setattr(layers._Casts, "wide", counted)
    model = layered(Deep().eval().requires_grad_(False))
    draws = Draws(seed=0, dtype=torch.float32, alike=True)
    x = torch.ones(4, 32, dtype=torch.float64)
    refer(
        lambda: contextlib.nullcontext(model), x, what="m", draws=draws, twice=twice, forward=None, dtype=torch.float64
    )
    assert len(living) >= 8 and max(living) <= 2, living
