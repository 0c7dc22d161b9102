"""Where it diverged: the model runs once on the CPU, and beside it every operator on the device, twice.

With the CPU's exact inputs an operator shows its *own* error; with what the device itself computed upstream, what it
*inherited* as well. So the first operator whose own error is above its floor is the one that is wrong, however far the
damage has spread. Nothing is dumped: what is kept is what the model itself keeps alive, once more on the device.

Where no operator is wrong with the CPU's inputs and the row still is, the model runs on the device by itself (`plain`):
an operator that writes into memory that it must not is named, and the module in which the device takes another path
than the CPU. Modules run side by side (`modules`) where nothing else explains the row, or as a fast first look.

An operator is a call of a torch function as the model makes it, `linear`, `softmax`, `add_`: each side computes it in
its own way.
"""

from harness.locate.finding import Finding, Step, Symptom
from harness.locate.lockstep import is_explained, named_operators
from harness.locate.search import locate

__all__ = ["Finding", "Step", "Symptom", "is_explained", "locate", "named_operators"]
