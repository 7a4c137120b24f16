"""DeepSpeed clips inside ``engine.step()``: it is told the limit before, and watched afterwards.

Nothing can run between its backward pass and its update, so gradclip does not clip there itself.
It writes its limit into DeepSpeed's configuration (``lower``), reads what the engine measured
(``observe``), and refuses what DeepSpeed cannot do, before anything is changed.

>>> config = {"zero_optimization": {"stage": 2}}
>>> lower(config, 0.5)
>>> config["gradient_clipping"]
0.5
"""

from gradclip.integrations.deepspeed.engine import EngineWatch as EngineWatch
from gradclip.integrations.deepspeed.engine import engine_of as engine_of
from gradclip.integrations.deepspeed.engine import lower as lower
from gradclip.integrations.deepspeed.engine import observe as observe
from gradclip.integrations.deepspeed.engine import uses_deepspeed as uses_deepspeed

__all__ = ["EngineWatch", "engine_of", "lower", "observe", "uses_deepspeed"]
