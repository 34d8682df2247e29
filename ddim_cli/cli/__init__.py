"""What a person types: one file a command, plus the console and the options they share.

Nothing here imports torch or diffusers at module level, so that ``--help`` is quick.
"""
