"""Random numbers, and the masks of dropout: bit i of byte i // 8 says whether element i is kept."""

from __future__ import annotations

import torch

from harness.emulator.operators.common import ints, upcast
from harness.emulator.table import aclop, operator


def _generator(seed: int, offset: int) -> torch.Generator:
    """A stream of its own: an NPU's streams differ from the CPU's as well, and are not public."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + offset) & (2**63 - 1))


def _room(out) -> torch.Tensor:
    return torch.empty(out.shape, dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)


def _enter_inplace(name: str, words: str, fill) -> None:
    """An operator that fills a tensor, by seed and offset as numbers, and as tensors to which a captured graph adds its
    own offset.
    """

    def compute(self, *arguments, out):
        *parameters, seed, offset = arguments
        return fill(*parameters, _generator(seed, offset), out)

    def compute_captured(self, *arguments, out):
        *parameters, seed, start, offset = arguments
        return fill(*parameters, _generator(int(seed), int(start) + offset), out)

    number = "uint64" if name == "Uniform" else "int"
    operator(f"aclnnInplace{name}", f"self! {words} seed:{number} offset:{number}")(compute)
    if name != "Bernoulli":
        operator(f"aclnnInplace{name}Tensor", f"self! {words} seed start offset:{number}")(compute_captured)


def normal(mean, std, generator, out):
    return _room(out).normal_(mean, std, generator=generator).to(out.dtype)


def uniform(low, high, generator, out):
    """In the dtype of the output: a wide number just below the end would round to the end."""
    return torch.empty(out.shape, dtype=out.dtype).uniform_(low, high, generator=generator)


def random(low, high, generator, out):
    result = torch.randint(low, high, out.shape, generator=generator).to(out.dtype)
    if not out.dtype.is_floating_point:
        return result
    end = torch.tensor(high, dtype=out.dtype)  # which a large whole number may be rounded to
    return torch.where(result < end, result, torch.nextafter(end, -end.abs() - 1))


def random_of_all(generator, out):
    return torch.empty(out.shape, dtype=out.dtype).random_(generator=generator)


def bernoulli(chance, generator, out):
    return _room(out).bernoulli_(chance, generator=generator).to(out.dtype)


_enter_inplace("Normal", "mean:float std:float", normal)
_enter_inplace("Uniform", "low:double high:double", uniform)
_enter_inplace("Random", "low:int high:int", random)
_enter_inplace("RandomWithoutFromTo", "", random_of_all)
_enter_inplace("Bernoulli", "chance:scalar", bernoulli)


@operator("aclnnInplaceBernoulliTensor", "self! chance seed:int offset:int")
def bernoulli_tensor(self, chance, seed, offset, out):
    return torch.bernoulli(upcast(chance).double().expand(out.shape), generator=_generator(seed, offset)).to(out.dtype)


@operator("aclnnSimThreadExponential", "self! count:int rate:double seed:int offset:int")
def exponential(self, count, rate, seed, offset, out):
    return _room(out).exponential_(rate, generator=_generator(seed, offset)).to(out.dtype)


def normal_of(mean, std, seed, offset, out):
    """Of a mean and a deviation each that are numbers or tensors."""
    standard = _room(out).normal_(generator=_generator(seed, offset))
    return (upcast(mean) + upcast(std) * standard).to(out.dtype)


for _name, _words in {
    "FloatFloat": "mean:float std:float",
    "FloatTensor": "mean:float std",
    "TensorFloat": "mean std:float",
    "TensorTensor": "mean std",
}.items():
    operator(f"aclnnNormal{_name}", f"{_words} seed:int offset:int >out")(normal_of)


@operator("aclnnMultinomial", "self count:int replacement:bool seed:int offset:int >out")
def multinomial(self, count, replacement, seed, offset, out):
    return torch.multinomial(upcast(self), count, replacement, generator=_generator(seed, offset)).to(out.dtype)


@operator("aclnnMultinomialTensor", "self count:int replacement:bool seed start offset:int >out")
def multinomial_captured(self, count, replacement, seed, start, offset, out):
    return multinomial(self, count, replacement, int(seed), int(start) + offset, out)


@operator("aclnnRandperm", "count:int seed:int offset:int >out")
def randperm(count, seed, offset, out):
    return torch.randperm(count, generator=_generator(seed, offset)).to(out.dtype)


@operator("aclnnLinspace", "start:scalar end:scalar steps:int >out")
def linspace(start, end, steps, out):
    return torch.linspace(start, end, steps, dtype=out.dtype).reshape(out.shape)


@operator("aclnnLogSpace", "start:scalar end:scalar steps:int base:double >out")
def logspace(start, end, steps, base, out):
    return torch.logspace(start, end, steps, base, dtype=out.dtype).reshape(out.shape)


def _packed_mask(count: int, chance: float, seed: int, offset: int, size: int) -> torch.Tensor:
    """The mask for so many elements of which this share is dropped, in so many bytes; what is beyond the elements is
    kept.
    """
    bits = torch.ones(size * 8, dtype=torch.uint8)
    bits[:count].bernoulli_(1 - chance, generator=_generator(seed, offset))
    return (bits.reshape(size, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    bits = (mask.flatten().view(torch.uint8).unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: like.numel()].reshape(like.shape).bool()


def masked(self, mask, scale: float, dtype):
    """Scaled where the bit of the element is set, else 0."""
    return torch.where(_unpacked(mask, self), upcast(self) * scale, 0).to(dtype)


def _scale(chance: float) -> float:
    return 1 / (1 - chance) if chance < 1 else 0.0


def _elements(shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@operator("aclnnDropoutGenMask", "shape:ints chance:double seed:int offset:int >out")
def dropout_mask(shape, chance, seed, offset, out):
    return _packed_mask(_elements(shape), chance, seed, offset, _elements(out.shape)).reshape(out.shape)


@operator("aclnnDropoutGenMaskV2", "shape:ints chance:double seed:int offset:int dtype:int32 >out")
def dropout_mask_v2(shape, chance, seed, offset, dtype, out):
    return dropout_mask(shape, chance, seed, offset, out)


@operator("aclnnDropoutGenMaskV2Tensor", "shape:ints chance:double seed start offset:int dtype:int32 >out")
def dropout_mask_captured(shape, chance, seed, start, offset, dtype, out):
    return dropout_mask(shape, chance, int(seed), int(start) + offset, out)


@operator("aclnnDropoutDoMask", "self mask chance:double >out")
def dropout_by_mask(self, mask, chance, out):
    return masked(self, mask, _scale(chance), out.dtype)


@operator("aclnnDropoutV3", "self noise_shape chance:double seed:int offset:int >out >mask")
def dropout(self, noise_shape, chance, seed, offset, out):
    mask = dropout_mask(self.shape, chance, seed, offset, out[1])
    return masked(self, mask, _scale(chance), out[0].dtype), mask


@operator("aclnnDropoutV3Grad", "grad mask scale:double >out")
def dropout_grad(grad, mask, scale, out):
    return masked(grad, mask, scale, out.dtype)


@aclop("StatelessDropOutGenMask")
def dropout_mask_of_keeping(shape, keep, seed, seed1, offset, out):
    """By the chance to keep, with the two halves of a wide seed and of an offset."""
    mixed = int(seed) ^ int(seed1) << 32
    return _packed_mask(_elements(ints(shape)), 1 - float(keep), mixed, ints(offset)[-1], _elements(out.shape)).reshape(
        out.shape
    )


@aclop("DropOutDoMask")
def dropout_of_keeping(x, mask, keep):
    return masked(x, mask, _scale(1 - float(keep)), x.dtype)
