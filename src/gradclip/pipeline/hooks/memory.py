"""Where RoboOrchardLab 0.4.0 has its hook that clears the cache of the device."""

from gradclip.pipeline.absent import refusing

__getattr__ = refusing(__name__)
