"""The Python interface: `import hfstrat; run = hfstrat.train(...)`. Each function does what the command of its name does.

Errors are `hfstrat.UserError` (a mistake that can be fixed) and its base `hfstrat.RunError`, with the sentences of the
commands; nothing ends the process. Torch is imported when a function needs it.
"""
