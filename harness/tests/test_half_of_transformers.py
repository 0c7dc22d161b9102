"""Half rows of transformers' models are of the model that from_pretrained(dtype=…) gives, and the report says where it
came from.
"""

import pytest
import torch
from torch import nn

from harness import Case, validate
from harness.reference import Models
from harness.tests.needs import emulated_device


@pytest.fixture(scope="module")
def device():
    return emulated_device()  # before transformers, which imports torch_npu


@pytest.fixture(scope="module")
def models():
    """One for all tests: each has a process of its own without torch_npu, and transformers is imported there for
    seconds.
    """
    return Models()


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64))


def small_t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=64))


MODELS = {"llama": small_llama, "t5": small_t5}
KEPT = {  # what transformers leaves in float32 in each dtype
    ("llama", "float16"): {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"},
    ("llama", "bfloat16"): {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"},
    ("t5", "float16"): {"encoder.block.0.layer.1.DenseReluDense.wo.weight"},
    ("t5", "bfloat16"): set(),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, device, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(folder)
    return request.param, folder


def load(folder, **how):
    kind = small_kind(folder)
    return kind.from_pretrained(folder, **how)


def small_kind(folder):
    import json

    import transformers

    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def ids(generator):
    return torch.randint(0, 64, (2, 9), generator=generator)


def first(model, x):
    return model(x)[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cast_keeps_what_from_pretrained_keeps(checkpoint, device, dtype):
    name, folder = checkpoint
    case = Case(name=name, model=lambda: load(folder, dtype=torch.float32), inputs=ids, dtype=dtype, forward=first)
    ours = tensors(Models().get(**case.built, device=torch.device("cpu")))
    theirs = tensors(load(folder, dtype=getattr(torch, dtype)))
    assert {item: ours[item].dtype for item in ours} == {item: theirs[item].dtype for item in theirs}
    assert all(torch.equal(ours[item], theirs[item]) for item in ours)
    assert {item for item in ours if ours[item].dtype == torch.float32} == KEPT[name, dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_builder_that_takes_the_dtype_and_a_cast_give_one_row(checkpoint, device, models, dtype):
    name, folder = checkpoint
    how = dict(name=name, inputs=ids, dtype=dtype, forward=first)
    cast = validate(Case(model=lambda: load(folder, dtype=torch.float32), **how), 1, device, models=models)
    built = validate(Case(model=lambda dtype: load(folder, dtype=dtype), **how), 1, device, models=models)
    assert cast.passed and built.passed
    assert cast.evidence.expected_sha256 == built.evidence.expected_sha256
    assert cast.evidence.actual_sha256 == built.evidence.actual_sha256
    assert cast.evidence.weights_from == built.evidence.weights_from == f"loaded:{folder}"


def test_a_model_of_a_config_alone_is_random(device, models):
    case = Case(name="llama", model=small_llama, inputs=ids, forward=first)
    assert validate(case, 1, device, models=models).evidence.weights_from == ""


def test_another_checkpoint_behind_the_same_case_is_not_comparable(device, models, tmp_path):
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        small_llama().save_pretrained(tmp_path)
        case = Case(name="llama", model=lambda: load(tmp_path, dtype=torch.float32), inputs=ids, forward=first)
        digests.append(validate(case, 1, device, models=models).evidence.weights_sha256)
    assert digests[0] == digests[1] != digests[2]


def test_a_mask_that_transformers_changes_beside_an_npu_is_named(device, models):
    from transformers import SwinConfig, SwinModel

    def model():
        made = SwinModel(
            SwinConfig(
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 4],
                window_size=4,
                patch_size=2,
                image_size=32,
                attn_implementation="sdpa",
            )
        )
        for module in made.modules():  # the bias that is passed as a mask starts as zeros
            if hasattr(module, "relative_position_bias_table"):
                nn.init.normal_(module.relative_position_bias_table)
        return made

    how = dict(
        name="swin",
        inputs=lambda generator: torch.randn(1, 3, 32, 32, generator=generator),
        forward=lambda model, x: model(x).last_hidden_state,
    )
    verdict = validate(Case(model=model, **how), 1, device, models=models)
    said = " ".join(map(str, verdict.failures))
    assert verdict.status == "FAIL"
    assert "the model computes otherwise where it sees an NPU" in said and "attn_implementation='eager'" in said

    def eager():
        made = model()
        made.set_attn_implementation("eager")
        return made

    assert validate(Case(model=eager, **how), 1, device, models=models).passed
