"""The engine: gradients in, ``ClipResult`` out; no I/O and no framework."""

from gradclip.clipping.clipper import GradientClipper as GradientClipper
from gradclip.clipping.functional import clip_grad_norm_ as clip_grad_norm_
from gradclip.clipping.functional import clip_grad_value_ as clip_grad_value_
from gradclip.clipping.functional import clip_grads_with_norm_ as clip_grads_with_norm_
from gradclip.clipping.functional import get_total_norm as get_total_norm
from gradclip.clipping.policies import AGCClip as AGCClip
from gradclip.clipping.policies import AnyPolicy as AnyPolicy
from gradclip.clipping.policies import EMAClip as EMAClip
from gradclip.clipping.policies import GuardClip as GuardClip
from gradclip.clipping.policies import NormClip as NormClip
from gradclip.clipping.policies import ObserveClip as ObserveClip
from gradclip.clipping.policies import Policy as Policy
from gradclip.clipping.policies import QuantileClip as QuantileClip
from gradclip.clipping.policies import Schedule as Schedule
from gradclip.clipping.policies import ValueClip as ValueClip
from gradclip.clipping.policies import ZScoreClip as ZScoreClip
from gradclip.clipping.result import ClipResult as ClipResult
from gradclip.clipping.result import ClipStats as ClipStats
from gradclip.clipping.step.withhold import withhold as withhold
