"""hfstrat: fine-tuning strategies on the Hugging Face Trainer."""

import os

__version__ = "0.1.0"

# no telemetry of any kind, and before any library reads it; a value of yours stays
for _name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "true" if _name.startswith("MLFLOW") else "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

# Threads of OpenMP that wait sleep after a short spin: the default of libgomp, which the Linux wheels of torch bring, spins for
# milliseconds, and beside another program that takes a core from the thread that is awaited (benchmarks/busy_machine). libgomp
# reads this once, when torch loads it; other OpenMP libraries ignore it. A setting of yours for any of them stays.
if not any(_name in os.environ for _name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")):
    os.environ["GOMP_SPINCOUNT"] = "3000"
