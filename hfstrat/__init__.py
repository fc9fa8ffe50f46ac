"""hfstrat: fine-tuning strategies on the Hugging Face Trainer."""

import os

__version__ = "0.1.0"

# no telemetry of any kind, and before any library reads it; a value of yours stays
for _name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "true" if _name.startswith("MLFLOW") else "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
