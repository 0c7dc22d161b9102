"""Operators of CANN's older path: the card's layouts, slices, optimizers, byte masks, and programs that compile when
they are called.
"""

import pytest
import torch

from harness import emulator
from harness.emulator import layouts
from harness.tests.operators.conftest import agrees, seeded


@pytest.fixture
def internal(npu):
    """Tensors may lie in the card's own layouts."""
    torch.npu.config.allow_internal_format = True
    yield npu
    torch.npu.config.allow_internal_format = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("format", "name", "shape"),
    [
        (29, "FRACTAL_NZ", (20, 33)),
        (29, "FRACTAL_NZ", (2, 3, 17, 18)),
        (3, "NC1HWC0", (2, 17, 3, 4)),
        (4, "FRACTAL_Z", (18, 17, 3, 2)),
        (27, "NDHWC", (2, 3, 4, 5, 6)),
        (32, "NDC1HWC0", (2, 17, 3, 4, 5)),
        (33, "FRACTAL_Z_3D", (18, 17, 2, 3, 1)),
    ],
)
def test_a_cast_to_a_layout_and_back_keeps_the_values(internal, format, name, shape, dtype):
    import torch_npu

    x = seeded(*shape, dtype=dtype)
    cast = torch_npu.npu_format_cast(x.to(internal), format)
    back = torch_npu.npu_format_cast(cast, {29: 2, 3: 0, 4: 0}.get(format, 30))
    assert torch_npu.get_npu_format(cast) == format or str(torch_npu.get_npu_format(cast)).endswith(name)
    assert torch.equal(cast.cpu(), x) and torch.equal(back.cpu(), x)


def test_the_blocks_of_fractal_nz_lie_column_by_column():
    x = torch.arange(17 * 20, dtype=torch.float32).reshape(17, 20)
    memory = layouts.pack(x, layouts.FRACTAL_NZ, (2, 2, 16, 16)).view(2, 2, 16, 16)
    for column, row, i, j in [(0, 0, 3, 5), (1, 0, 3, 2), (0, 1, 0, 7), (1, 1, 0, 3)]:
        assert memory[column, row, i, j] == x[16 * row + i, 16 * column + j]
    assert memory[1, 1, 5, 5] == 0
    assert torch.equal(layouts.unpack(memory.reshape(-1), layouts.FRACTAL_NZ, (2, 2, 16, 16), (17, 20)), x)


def test_products_read_weights_in_blocks(internal):
    import torch_npu

    x, weight = seeded(5, 40, dtype=torch.float16), seeded(40, 24, seed=1, dtype=torch.float16)
    blocked = torch_npu.npu_format_cast(weight.to(internal), 29)
    torch.testing.assert_close((x.to(internal) @ blocked).cpu(), x @ weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch.add, [(3, 4), (3, 4)]),
        (torch.mul, [(3, 4), (4,)]),
        (torch.abs, [(3, 4)]),
        (torch.exp, [(3, 4)]),
        (torch.sigmoid, [(3, 4)]),
        (lambda x, y: torch.cat([x, y], 1), [(3, 4), (3, 2)]),
        (lambda x: x.transpose(0, 1).contiguous(), [(3, 4)]),
        (torch.nn.functional.mish, [(3, 4)]),
        (lambda x: x.sum(1), [(3, 4)]),
        (lambda x: torch.softmax(x, -1), [(3, 4)]),
        (lambda x: torch.log_softmax(x, -1), [(3, 4)]),
        (lambda x: x.topk(2, -1)[0], [(3, 4)]),
        (torch.mm, [(3, 4), (4, 5)]),
    ],
)
def test_a_program_that_compiles_its_operators_computes_the_same(compiling, function, shapes):
    agrees(compiling, function, *(seeded(*shape, seed=n) for n, shape in enumerate(shapes)), backward=False)


def test_adam_of_one_step(npu):
    import torch_npu

    variable, m, v, grad = (seeded(5, seed=n) for n in range(4))
    v = v.abs()
    moved = [tensor.to(npu) for tensor in (variable, m, v)]
    torch_npu.npu_apply_adam(0.9, 0.99, 0.1, 0.9, 0.99, 1e-8, grad.to(npu), False, False, out=tuple(moved))
    m_new, v_new = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad * grad
    expected = variable - 0.1 * (1 - 0.99) ** 0.5 / (1 - 0.9) * m_new / (v_new.sqrt() + 1e-8)
    for actual, wanted in zip(moved, (expected, m_new, v_new)):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-4, atol=1e-5)


def test_signs_are_packed_from_the_lowest_bit(npu):
    import torch_npu

    x = torch.tensor([1.0, -1, 1, 1, -1, -1, -1, -1, 2])
    packed = torch_npu.npu_sign_bits_pack(x.to(npu), 1)
    assert packed.cpu().tolist() == [[0b1101, 1]]
    assert torch_npu.npu_sign_bits_unpack(packed[0], 1, torch.float32).cpu()[0, :9].tolist() == x.sign().tolist()


def test_slices_and_transpositions(npu):
    import torch_npu

    x = seeded(4, 5, 6)
    assert torch.equal(torch_npu.npu_slice(x.to(npu), [1, 0, 2], [2, 5, 3]).cpu(), x[1:3, :, 2:5])
    assert torch.equal(torch_npu.npu_indexing(x.to(npu), [0, 1, 0], [4, 4, 6], [2, 1, 3]).cpu(), x[::2, 1:4, ::3])
    assert torch.equal(torch_npu.npu_transpose(x.to(npu), (2, 0, 1)).cpu(), x.permute(2, 0, 1))


def test_faults_act_on_the_older_path_by_its_types(npu):
    import torch_npu

    x = seeded(4, 6)
    with emulator.fault("Slice", kind="scale", by=2.0) as planted:
        result = torch_npu.npu_slice(x.to(npu), [0, 0], [2, 3]).cpu()
    assert planted.hits == 1 and torch.equal(result, x[:2, :3] * 2)


VIEWS = {
    "columns": lambda x: x[:, 1:4],
    "steps": lambda x: x[1:, 1::2],
    "transposed": lambda x: x.t(),
    "diagonal": lambda x: x[:, 1:].diagonal(),
    "one": lambda x: x[2, 3],
    "none": lambda x: x[:, 4:4],
    "rows of steps": lambda x: x[::2].unsqueeze(1)[..., ::3],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("name", VIEWS)
def test_a_copy_into_a_view_leaves_what_lies_between(compiling, name, dtype):
    view = VIEWS[name]
    base, source = (seeded(4, 6, seed=seed).mul(9).to(dtype) for seed in (0, 1))
    there = base.to(compiling)
    with emulator.fault("ViewCopy", kind="hang", seconds=0) as met:
        view(there).copy_(view(source.to(compiling)))
        after_steps = torch.zeros(4, 12, dtype=dtype, device=compiling)
        after_steps[:, 1::2] = source.to(compiling)
    assert met.hits == 1 + (name not in ("none", "one"))
    view(base).copy_(view(source))
    assert there.dtype == dtype and torch.equal(there.cpu(), base)
    assert torch.equal(after_steps[:, 1::2].cpu(), source) and not after_steps[:, ::2].any()


def test_a_copy_into_a_view_of_itself(compiling):
    x = torch.arange(24.0).reshape(4, 6)
    there = x.to(compiling)
    there[:, 1:4].copy_(there[:, 0:3])
    assert torch.equal(there.cpu(), torch.cat([x[:, :1], x[:, :3], x[:, 4:]], 1))
