"""transformers' AIMv2 as a second opinion: built from our weights through the converter."""

import torch

from harness.models.aimv2 import AIMv2, convert_checkpoint
from harness.tests.needs import import_transformers


def transformers_model(model: AIMv2, folder):
    """transformers' model with the weights of `model`, written, converted and read in `folder`."""
    from safetensors.torch import save_file

    transformers = import_transformers()
    source = folder / "apple"
    source.mkdir(parents=True)
    save_file(model.state_dict(), source / "model.safetensors")
    (source / "config.json").write_text(
        f'{{"num_attention_heads": {model.config.heads}, "rms_norm_eps": {model.config.eps}}}'
    )
    convert_checkpoint(source, folder / "transformers", to="transformers")
    loaded, notes = transformers.Aimv2VisionModel.from_pretrained(folder / "transformers", output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval().requires_grad_(False)


def in_float64(reference):
    """The same model in float64; its norms, which stay in float32 there, are replaced by true ones."""
    from transformers.models.aimv2.modeling_aimv2 import Aimv2RMSNorm

    class Norm(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.eps = (
                torch.nn.Parameter(norm.weight.detach().double(), requires_grad=False),
                norm.variance_epsilon,
            )

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    for parent in list(reference.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Aimv2RMSNorm):
                setattr(parent, name, Norm(child))
    return reference.double()
