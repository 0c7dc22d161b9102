"""The rows of the checkpoints that `--precision-checkpoint` names, for a repository without a file of cases for them.

pytest --pyargs harness.plugin.checkpoint_rows --precision-checkpoint=DIR
"""

from harness.plugin.checkpoints import CheckpointRun, is_asked, pytest_generate_tests

__all__ = ["pytest_generate_tests"]

if is_asked():

    def test_precision(precision, checkpoint: CheckpointRun):
        checkpoint.run(precision)
