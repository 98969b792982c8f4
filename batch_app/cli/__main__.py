"""`python -m batch_app.cli`: the same as `vllm-batch`."""

from batch_app.cli.program import main

if __name__ == "__main__":
    main()
