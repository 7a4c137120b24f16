"""What ``gradclip run`` does: run somebody's script as ``python`` would, and watch its steps.

Nothing here imports torch before the script does: scripts set variables that torch reads when it is
imported. ``watch.py`` and what it imports need torch, and are imported at the first step.
"""
