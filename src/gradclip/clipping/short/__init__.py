"""The short ways: what most steps come to, without what only unusual ones need.

Each answers only where nothing is unusual. Otherwise nothing was done, and the engine goes its
ordinary way from the start.
"""

from gradclip.clipping.short.fused import Fused
from gradclip.clipping.short.lean import Lean
from gradclip.clipping.short.results import FusedResult
from gradclip.clipping.short.ways import ShortWays

__all__ = ["Fused", "FusedResult", "Lean", "ShortWays"]
