"""Every file of tests may begin with `import torch`, also where torch_npu is installed and CANN is not."""

from harness import autoload

autoload.hold()
