"""Configurations: checked values that name a class, travel through files, and build the class."""

from gradclip.config.base import AnyConfig as AnyConfig
from gradclip.config.base import Config as Config
from gradclip.config.base import ConfigOf as ConfigOf
from gradclip.config.class_config import ClassConfig as ClassConfig
from gradclip.config.class_config import ClassInitFromConfigMixin as ClassInitFromConfigMixin
from gradclip.config.class_config import ClassType as ClassType
from gradclip.config.class_type import register as register
from gradclip.config.files import dump as dump
from gradclip.config.files import load as load
from gradclip.config.numbers import Ceiling as Ceiling
from gradclip.config.numbers import NormOrder as NormOrder
from gradclip.config.numbers import as_ceiling as as_ceiling
from gradclip.config.numbers import as_norm_order as as_norm_order

__all__ = [
    "AnyConfig",
    "Ceiling",
    "ClassConfig",
    "ClassInitFromConfigMixin",
    "ClassType",
    "Config",
    "ConfigOf",
    "NormOrder",
    "as_ceiling",
    "as_norm_order",
    "dump",
    "load",
    "register",
]
