"""Drafters with weights, trained on what the target itself answers.

The target answers the training prompts (greedy, many at once); a kind of drafter, a file each here, says what
learns from them by which loss (`common.Trainee`). Muon on the matrices, AdamW on the rest, and an exponential
average of the weights is what is written.
"""

from .common import Settings
from .runs import KINDS, judge, lines, run, settings_of

__all__ = ["KINDS", "Settings", "judge", "lines", "run", "settings_of"]
