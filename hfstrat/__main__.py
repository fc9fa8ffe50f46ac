from hfstrat.cli.main import main

main()
