"""Entry for launchers: `accelerate launch -m hfstrat.train RECIPE [key=value ...] [--overwrite]`."""

from hfstrat.errors import quiet_libraries

quiet_libraries()  # bitsandbytes, which PEFT imports in every run, warns while it is imported

from hfstrat.run.train import main  # noqa: E402

if __name__ == "__main__":
    main()
