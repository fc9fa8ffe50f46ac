"""Entry for launchers: `accelerate launch -m hfstrat.train RECIPE [key=value ...] [--overwrite]`."""

from hfstrat.run.train import main

if __name__ == "__main__":
    main()
