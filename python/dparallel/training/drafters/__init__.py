"""Trains drafters with weights on the target's own answers.

The target answers the training prompts (greedy, many at once). Each kind of drafter has a file here with its
module and its loss (`common.Trainee`). Muon trains the matrices, AdamW the rest; an exponential average of
the weights is saved.
"""

from .common import DrafterSettings
from .runs import KINDS, judge, report_lines, run, saved_progress, settings_of

__all__ = ["KINDS", "DrafterSettings", "judge", "report_lines", "run", "saved_progress", "settings_of"]
