"""hfstrat: fine-tuning strategies on the Hugging Face Trainer.

    run = hfstrat.train(model="HuggingFaceTB/SmolLM2-135M", train_dataset=rows, strategy="lora", output_dir="runs/mine")

Public names: `train`, `evaluate`, `load`, `advise`, `compare`, `tune`, `Run`, `RunError`, `UserError`. They are imported when
they are used; torch is imported when a function needs it.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from hfstrat.api.functions import advise, compare, evaluate, load, train, tune
    from hfstrat.api.run import Run
    from hfstrat.errors import RunError, UserError

__all__ = ["Run", "RunError", "UserError", "__version__", "advise", "compare", "evaluate", "load", "train", "tune"]
_PLACES = {"Run": "hfstrat.api.run", "RunError": "hfstrat.errors", "UserError": "hfstrat.errors"}


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module 'hfstrat' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PLACES.get(name, "hfstrat.api.functions")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
