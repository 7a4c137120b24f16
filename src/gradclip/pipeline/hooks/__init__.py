"""Hooks around the parts of a training step, and the sets of them that gradclip comes with."""

from gradclip.hook import HookContext as HookContext
from gradclip.hook import HookContextChannel as HookContextChannel
from gradclip.hook import RemovableHandle as RemovableHandle
from gradclip.hook import RemoveableHandle as RemoveableHandle
from gradclip.pipeline.hooks.checkpoint import SaveCheckpoint as SaveCheckpoint
from gradclip.pipeline.hooks.checkpoint import SaveCheckpointConfig as SaveCheckpointConfig
from gradclip.pipeline.hooks.grad_clip import GradientClippingHook as GradientClippingHook
from gradclip.pipeline.hooks.grad_clip import (
    GradientClippingHookConfig as GradientClippingHookConfig,
)
from gradclip.pipeline.hooks.mixin import HookListConfig as HookListConfig
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
from gradclip.pipeline.hooks.validation import ValidationHook as ValidationHook
from gradclip.pipeline.hooks.validation import ValidationHookConfig as ValidationHookConfig

__all__ = [
    "GradientClippingHook",
    "GradientClippingHookConfig",
    "HookContext",
    "HookContextChannel",
    "HookListConfig",
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
    "ValidationHook",
    "ValidationHookConfig",
]
