from hfstrat.cli import main

main()
