"""The command line, `vllm-batch`. Flags win over the environment, that over vllm-batch.toml.

`program.py` puts the commands together; each other module has those of one subject. Data goes to
standard output, what is said about it to standard error. Commands raise the errors of
`batch_app.errors`; `program.py` turns them into one line and an exit code.
"""

from batch_app.cli.program import app, main

__all__ = ["app", "main"]
