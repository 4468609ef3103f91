"""DeepSpeed's own knowledge of its configuration: the models of its typed sections, and the keys that it removed."""

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig
from deepspeed.runtime import config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

# Sections of the run file -> the pydantic model with which DeepSpeed checks them. Left out are those that megagpt
# checks with a model of its own (config/deepspeed.py) or refuses (config/deepspeed_keys.py).
SECTION_MODELS: dict[str, type[BaseModel]] = {
    "bf16": DeepSpeedBF16Config,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "fp16": DeepSpeedFP16Config,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "zero_optimization": DeepSpeedZeroConfig,
}

# Dotted keys that older versions read -> DeepSpeed's advice.
REMOVED_KEYS: dict[str, str] = {
    **config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
    **{f"zero_optimization.{key}": why for key, why in config._REMOVED_ZERO_CONFIG_KEYS.items()},
}
