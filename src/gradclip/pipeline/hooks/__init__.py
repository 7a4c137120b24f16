"""Hooks around the parts of a training step, and the sets of them that gradclip comes with."""

from gradclip.hook import HookContext as HookContext
from gradclip.hook import HookContextChannel as HookContextChannel
from gradclip.hook import RemovableHandle as RemovableHandle
from gradclip.hook import RemoveableHandle as RemoveableHandle
from gradclip.pipeline.absent import refusing as _refusing
from gradclip.pipeline.hooks.checkpoint import SaveCheckpoint as SaveCheckpoint
from gradclip.pipeline.hooks.checkpoint import SaveCheckpointConfig as SaveCheckpointConfig
from gradclip.pipeline.hooks.grad_clip import GradientClippingHook as GradientClippingHook
from gradclip.pipeline.hooks.grad_clip import (
    GradientClippingHookConfig as GradientClippingHookConfig,
)
from gradclip.pipeline.hooks.loss_tracker import (
    LossMovingAverageTracker as LossMovingAverageTracker,
)
from gradclip.pipeline.hooks.loss_tracker import (
    LossMovingAverageTrackerConfig as LossMovingAverageTrackerConfig,
)
from gradclip.pipeline.hooks.loss_tracker import LossTracker as LossTracker
from gradclip.pipeline.hooks.loss_tracker import LossTrackerConfig as LossTrackerConfig
from gradclip.pipeline.hooks.metric import MetricEntry as MetricEntry
from gradclip.pipeline.hooks.metric import MetricTracker as MetricTracker
from gradclip.pipeline.hooks.metric import MetricTrackerConfig as MetricTrackerConfig
from gradclip.pipeline.hooks.mixin import ClassType as ClassType
from gradclip.pipeline.hooks.mixin import HookListConfig as HookListConfig
from gradclip.pipeline.hooks.mixin import ModelOutput as ModelOutput
from gradclip.pipeline.hooks.mixin import ModelOutputHasLossKeys as ModelOutputHasLossKeys
from gradclip.pipeline.hooks.mixin import PipelineHookArgs as PipelineHookArgs
from gradclip.pipeline.hooks.mixin import PipelineHookChanelType as PipelineHookChanelType
from gradclip.pipeline.hooks.mixin import PipelineHookChannelType as PipelineHookChannelType
from gradclip.pipeline.hooks.mixin import PipelineHooks as PipelineHooks
from gradclip.pipeline.hooks.mixin import PipelineHooksConfig as PipelineHooksConfig
from gradclip.pipeline.hooks.optimizer import OptimizerHook as OptimizerHook
from gradclip.pipeline.hooks.optimizer import OptimizerHookConfig as OptimizerHookConfig
from gradclip.pipeline.hooks.progress import ProgressHook as ProgressHook
from gradclip.pipeline.hooks.progress import ProgressHookConfig as ProgressHookConfig
from gradclip.pipeline.hooks.record import RecordHook as RecordHook
from gradclip.pipeline.hooks.record import RecordHookConfig as RecordHookConfig
from gradclip.pipeline.hooks.stats import StatsMonitor as StatsMonitor
from gradclip.pipeline.hooks.stats import StatsMonitorConfig as StatsMonitorConfig
from gradclip.pipeline.hooks.tracker import TrackerHook as TrackerHook
from gradclip.pipeline.hooks.tracker import TrackerHookConfig as TrackerHookConfig
from gradclip.pipeline.hooks.validation import ValidationHook as ValidationHook
from gradclip.pipeline.hooks.validation import ValidationHookConfig as ValidationHookConfig

__getattr__ = _refusing(__name__)

__all__ = [
    "ClassType",
    "GradientClippingHook",
    "GradientClippingHookConfig",
    "HookContext",
    "HookContextChannel",
    "HookListConfig",
    "LossMovingAverageTracker",
    "LossMovingAverageTrackerConfig",
    "LossTracker",
    "LossTrackerConfig",
    "MetricEntry",
    "MetricTracker",
    "MetricTrackerConfig",
    "ModelOutput",
    "ModelOutputHasLossKeys",
    "OptimizerHook",
    "OptimizerHookConfig",
    "PipelineHookArgs",
    "PipelineHookChanelType",
    "PipelineHookChannelType",
    "PipelineHooks",
    "PipelineHooksConfig",
    "ProgressHook",
    "ProgressHookConfig",
    "RecordHook",
    "RecordHookConfig",
    "RemovableHandle",
    "RemoveableHandle",
    "SaveCheckpoint",
    "SaveCheckpointConfig",
    "StatsMonitor",
    "StatsMonitorConfig",
    "TrackerHook",
    "TrackerHookConfig",
    "ValidationHook",
    "ValidationHookConfig",
]
