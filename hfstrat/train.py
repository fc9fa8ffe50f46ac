"""Entry for launchers: `accelerate launch -m hfstrat.train RECIPE [key=value ...] [--overwrite]`."""

import sys
import types
from typing import Any

from hfstrat.errors import quiet_libraries

quiet_libraries()  # bitsandbytes, which PEFT imports in every run, warns while it is imported

from hfstrat.run.train import main  # noqa: E402


class _Entry(types.ModuleType):
    """This module has the name of the function `hfstrat.train`, and replaces it as an attribute once it is imported."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from hfstrat.api.functions import train

        return train(*args, **kwargs)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _Entry
