"""Accuracy of any checkpoint: `pytest -k precision --checkpoint DIR`, as often as there are checkpoints.

DIR is a directory of transformers, sentence-transformers, diffusers, timm, PEFT or AIMv2, a file of torch.export or
TorchScript, a folder of such, or module:function. Without the option nothing is collected here.
"""

from harness.plugin.checkpoints import CheckpointRun, is_asked, pytest_generate_tests  # noqa: F401

if is_asked():

    def test_precision(precision, checkpoint: CheckpointRun):
        checkpoint.run(precision)
