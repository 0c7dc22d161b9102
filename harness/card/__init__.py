"""From a checkpoint directory to the repository that is published for it: README, scripts, numbers and logs.

`harness.card.making.make` measures and writes the folder. What a README says comes from one dictionary, `card`, which
the folder keeps as results/card.json, and from templates that a team replaces by its own.
"""
